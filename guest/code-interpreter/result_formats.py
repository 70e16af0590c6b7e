"""Runs in each Python kernel before its first cell: what results have beside IPython's own formats.

    e2b/data           the columns of a pandas DataFrame
    e2b/chart          what a matplotlib figure shows: `Chart` of the clients, with the fields that they expect
    application/json   dicts and lists that JSON can hold

An object may give either of the first two itself: `_repr_e2b_data_`, `_repr_e2b_chart_`. Nothing is imported here that the
cell has not imported: a figure is one only when matplotlib is loaded. A result that is bigger than `MAX_VALUES` has none of
these formats; its text, table and picture are not affected.
"""

import math
import re
import sys
from datetime import date, time

from IPython import get_ipython
from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode

# Numbers and texts of one result: some 20 MB of JSON.
MAX_VALUES = 1_000_000
# Of a dict or list that is the result of a cell; walked in Python.
MAX_JSON_VALUES = 100_000
UNIT = re.compile(r"\s\((.*?)\)|\[(.*?)\]")


def plain(value):
    """`value` as JSON has it: a number, a text, a truth value or nothing."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    # Dates of the standard library and of pandas, whose "no time" is a date too.
    if isinstance(value, (date, time)):
        return value.isoformat() if value == value else None
    if value is getattr(sys.modules.get("pandas"), "NA", object):
        return None
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.datetime64):
            return None if numpy.isnat(value) else str(value.astype("datetime64[s]"))
        if value is numpy.ma.masked:
            return None
        if isinstance(value, numpy.generic):
            return plain(value.item())
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def point(value):
    """A coordinate: a text or a number, which is a float also when it is whole."""
    value = plain(value)
    return float(value) if isinstance(value, int) else value


class DataFormatter(BaseFormatter):
    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = (dict, str)

    def __call__(self, obj):
        pandas = sys.modules.get("pandas")
        if pandas is None or not isinstance(obj, getattr(pandas, "DataFrame", ())):
            return super().__call__(obj)
        if obj.size > MAX_VALUES:
            return None
        # By position: two columns may have one name.
        return {str(name): [plain(value) for value in obj.iloc[:, at].tolist()] for at, name in enumerate(obj.columns)}


class ChartFormatter(BaseFormatter):
    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = (dict, str)

    def __call__(self, obj):
        figures = sys.modules.get("matplotlib.figure")
        if figures is None or not isinstance(obj, figures.Figure):
            return super().__call__(obj)
        try:
            return chart_of_figure(obj)
        except Exception as error:  # noqa: BLE001 the picture is the result all the same
            print(f"kelvin: no data for this chart: {type(error).__name__}: {error}", file=sys.stderr)
            return None


class JsonFormatter(JSONFormatter):
    def __call__(self, obj):
        if type(obj) in (dict, list) and obj:
            try:
                return json_of(obj, [MAX_JSON_VALUES])
            except ValueError:
                return None
        return super().__call__(obj)


def json_of(value, left):
    """`value` with only what JSON has; `ValueError` when it has something else, or more than `left`."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("too big")
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int, float, bool, type(None))) for key in value):
            raise ValueError("keys")
        return {key if isinstance(key, str) else str(plain(key)): json_of(item, left) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_of(item, left) for item in value]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.ndim:
        return [json_of(item, left) for item in value]
    if value is None or isinstance(value, (str, bool, int, float, date, time)):
        return plain(value)
    if numpy is not None and isinstance(value, numpy.generic):
        return plain(value)
    raise ValueError("not of JSON")


def chart_of_figure(figure):
    """What a figure shows; `None` when it shows nothing or too much."""
    all_axes = figure.get_axes()
    if not any(axes.has_data() for axes in all_axes) or sum(map(size, all_axes)) > MAX_VALUES:
        return None
    if len(all_axes) == 1:
        return chart_of_axes(all_axes[0])
    title = figure._suptitle.get_text() if getattr(figure, "_suptitle", None) else ""
    return {"type": "superchart", "title": title, "elements": [chart_of_axes(axes) for axes in all_axes]}


def size(axes):
    points = sum(len(line.get_xdata(orig=True)) for line in axes.lines)
    return 2 * (points + sum(len(collection.get_offsets()) for collection in axes.collections)) + len(axes.patches)


def chart_of_axes(axes):
    from matplotlib.collections import PathCollection
    from matplotlib.patches import Rectangle, Wedge

    # Lines across the whole of the axes are helpers, not data.
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    others = [*axes.images, *axes.artists, *axes.tables]
    patches, collections = list(axes.patches), list(axes.collections)
    if not others and not collections:
        boxes = boxes_of(axes, lines, patches)
        if boxes:
            return boxes
        if lines and not patches:
            return points_chart(axes, "line", [line_points(line) for line in lines])
    if not others and not lines:
        if collections and not patches and all(isinstance(one, PathCollection) for one in collections):
            return points_chart(axes, "scatter", [scatter_points(axes, one) for one in collections])
        if patches and not collections and all(isinstance(one, Wedge) for one in patches):
            return {"type": "pie", "title": axes.get_title() or None, "elements": [wedge(one) for one in patches]}
        if patches and not collections and all(isinstance(one, Rectangle) for one in patches):
            return bars_of(axes)
    return {"type": "unknown", "title": axes.get_title() or None, "elements": []}


def labels_of(axes, swapped=False):
    """Title, labels and units. On `swapped` axes the values run along x; clients expect them in y."""
    chart = {"title": axes.get_title() or None}
    for name, text in zip("yx" if swapped else "xy", (axes.get_xlabel(), axes.get_ylabel())):
        unit = UNIT.search(text)
        chart[f"{name}_label"] = text or None
        chart[f"{name}_unit"] = (unit.group(1) or unit.group(2)) if unit else None
    return chart


def is_of_dates(axis):
    from matplotlib import dates

    formatters = (dates.DateFormatter, dates.AutoDateFormatter, dates.ConciseDateFormatter)
    return isinstance(axis.get_major_locator(), dates.DateLocator) or isinstance(axis.get_major_formatter(), formatters)


def is_of_names(axis):
    """Whether ticks are at names, not on a scale."""
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    return isinstance(axis.get_major_formatter(), (StrCategoryFormatter, FixedFormatter, FuncFormatter))


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def coordinate(axis, number):
    """A number on an axis as the clients have it: a time on an axis of dates."""
    from matplotlib import dates

    return dates.num2date(number).isoformat() if is_of_dates(axis) else plain(number)


def scale_of(axis, ticks, texts):
    if is_of_dates(axis):
        return "datetime"
    if axis.get_scale() != "linear":
        return axis.get_scale()
    # Names are at 0, 1, 2 ...
    named = all(tick == at and text != str(at) for at, (tick, text) in enumerate(zip(ticks, texts)))
    return "categorical" if texts and named else "linear"


def points_chart(axes, kind, elements):
    chart = {"type": kind, **labels_of(axes), "elements": elements}
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        ticks, texts = [float(tick) for tick in axis.get_ticklocs()], tick_texts(axis)
        chart[f"{name}_ticks"] = [coordinate(axis, tick) for tick in ticks]
        chart[f"{name}_tick_labels"] = texts
        chart[f"{name}_scale"] = scale_of(axis, ticks, texts)
    return chart


def line_points(line):
    label = str(line.get_label())
    if label.startswith("_child"):
        label = f"Line {label[len('_child'):]}"
    # As they were given: names and times are not numbers here.
    x, y = line.get_xdata(orig=True), line.get_ydata(orig=True)
    return {"label": label, "points": [[point(one), point(other)] for one, other in zip(x, y)]}


def scatter_points(axes, collection):
    points = [[coordinate(axes.xaxis, x), coordinate(axes.yaxis, y)] for x, y in collection.get_offsets()]
    return {"label": str(collection.get_label()), "points": points}


def wedge(patch):
    # Angles are of 32 bits: what is beyond their precision is noise.
    angle = float(f"{abs(float(patch.theta2) - float(patch.theta1)):.6g}")
    return {"label": str(patch.get_label()), "angle": angle, "radius": float(patch.r)}


def bars_of(axes):
    from matplotlib.container import BarContainer

    containers = [container for container in axes.containers if isinstance(container, BarContainer)]
    across = bool(containers) and all(container.orientation == "horizontal" for container in containers)
    axis, elements = (axes.yaxis if across else axes.xaxis), []
    for container in containers:
        group = str(container.get_label())
        if group.startswith("_container"):
            group = f"Group {group[len('_container'):]}"
        places = [bar.get_y() + bar.get_height() / 2 if across else bar.get_x() + bar.get_width() / 2 for bar in container]
        values = [bar.get_width() if across else bar.get_height() for bar in container]
        for label, value in zip(place_labels(axis, places), values):
            elements.append({"label": label, "group": group, "value": plain(float(value))})
    return {"type": "bar", **labels_of(axes, swapped=across), "elements": elements}


def place_labels(axis, places):
    """What stands at `places` of an axis: the name there, else where it is."""
    ticks, texts = list(axis.get_ticklocs()), tick_texts(axis)
    if is_of_names(axis) and ticks:
        if len(ticks) == len(places):
            return texts
        nearest = (min(range(len(ticks)), key=lambda at, place=place: abs(ticks[at] - place)) for place in places)
        return [texts[at] for at in nearest]
    return [str(coordinate(axis, place)) if is_of_dates(axis) else f"{place:.12g}" for place in places]


def boxes_of(axes, lines, patches):
    """The box plot that `lines` and `patches` are, or `None`. matplotlib keeps no record of it: the shapes tell."""
    from matplotlib.patches import PathPatch

    if not lines or not all(type(patch) is PathPatch for patch in patches):
        return None
    shapes = [patch.get_path().vertices for patch in patches]
    strokes = []
    for line in lines:
        points = line.get_xydata()
        closed = len(points) >= 5 and (points[0] == points[-1]).all() and line.get_linestyle() != "None"
        shapes.append(points) if closed else strokes.append((line, points))
    if not shapes:
        return None
    for across in (False, True):
        boxes = [box(shape, strokes, across) for shape in shapes]
        if all(boxes):
            names = place_labels(axes.yaxis if across else axes.xaxis, [one.pop("place") for one in boxes])
            elements = [{"label": name, **one} for name, one in zip(names, boxes)]
            return {"type": "box_and_whisker", **labels_of(axes, swapped=across), "elements": elements}
    return None


def box(shape, strokes, across):
    """A box of a box plot with its whiskers and points; `None` when it has none. `across`: the values run along x."""
    along, place = (0, 1) if across else (1, 0)
    low, high = float(shape[:, along].min()), float(shape[:, along].max())
    left, right = float(shape[:, place].min()), float(shape[:, place].max())
    middle = (left + right) / 2
    slack = 1e-6 * max(abs(high), abs(low), 1e-300)

    def near(one, other, within=slack):
        return abs(one - other) <= within

    median = bottom = top = None
    widest = 0.0
    loose = []
    for line, points in strokes:
        values, places = points[:, along], points[:, place]
        if not len(points) or not all(left <= one <= right for one in places):
            continue
        if line.get_linestyle() == "None":
            loose.append([float(value) for value in values])
        elif len(points) == 2 and near(places[0], places[1], 1e-6 * (right - left)) and near(places[0], middle, 1e-6 * (right - left)):
            if near(values.max(), low):
                bottom = float(values.min())
            elif near(values.min(), high):
                top = float(values.max())
            if near(low, high) and bottom is not None and top is None and near(values.min(), high):
                top = float(values.max())
        elif len(points) == 2 and near(values[0], values[1]) and low - slack <= values[0] <= high + slack:
            # The cap of a whisker without length is there too: not as wide, or drawn before.
            width = abs(float(places[1] - places[0]))
            if width >= widest * (1 - 1e-6):
                median, widest = float(values[0]), width
    if median is None or bottom is None or top is None:
        return None
    return {
        "place": middle,
        "min": bottom,
        "first_quartile": low,
        "median": median,
        "third_quartile": high,
        "max": top,
        # The mark of a mean comes before the points, and is within the whiskers when there are none.
        "outliers": [value for value in (loose[-1] if loose else []) if not bottom <= value <= top],
    }


def install(shell):
    # Tracebacks are read by programs.
    shell.run_line_magic("colors", "NoColor")
    for kind in (DataFormatter, ChartFormatter, JsonFormatter):
        formatter = kind(parent=shell.display_formatter)
        shell.display_formatter.formatters[formatter.format_type] = formatter


install(get_ipython())
