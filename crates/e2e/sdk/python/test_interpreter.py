"""The code interpreter's client."""

import base64
import threading
import time

import pytest
from e2b import SandboxException, TimeoutException
from e2b_code_interpreter import Sandbox
from e2b_code_interpreter.charts import (
    BarChart,
    BoxAndWhiskerChart,
    ChartType,
    LineChart,
    PieChart,
    ScatterChart,
    SuperChart,
)

# Ends by no interrupt.
STUCK = """
import time
print("stuck", flush=True)
while True:
    try: time.sleep(1)
    except KeyboardInterrupt: pass
"""


class Running:
    """A cell that runs in another thread."""

    def __init__(self, sandbox, code, **options):
        self.printed = threading.Event()
        self.execution = None

        def run():
            self.execution = sandbox.run_code(code, on_stdout=lambda _: self.printed.set(), **options)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def ended(self, within):
        """What it returned, at most `within` seconds from now."""
        self.thread.join(within)
        assert not self.thread.is_alive(), f"it still runs after {within} s"
        return self.execution


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox.create("code-interpreter", timeout=600)
    yield sandbox
    sandbox.kill()


def test_cells_keep_state(sandbox):
    assert sandbox.run_code("x = 41").error is None
    execution = sandbox.run_code("print('shown'); x + 1")
    assert (execution.text, execution.logs.stdout, execution.execution_count) == ("42", ["shown\n"], 2)


def test_errors_are_told(sandbox):
    error = sandbox.run_code("1 / 0").error
    assert (error.name, error.value) == ("ZeroDivisionError", "division by zero") and "ZeroDivisionError" in error.traceback
    assert "\x1b" not in error.traceback


def test_output_streams(sandbox):
    seen = []
    sandbox.run_code(
        "import time\nfor n in range(3): print(n, flush=True); time.sleep(0.5)",
        on_stdout=lambda message: seen.append((time.monotonic(), message.line)),
    )
    assert [line for _, line in seen] == ["0\n", "1\n", "2\n"] and seen[2][0] - seen[0][0] > 0.5


def test_a_chart_is_a_png_and_its_data(sandbox):
    result = sandbox.run_code(
        """
        import matplotlib.pyplot as plt
        plt.plot([1, 2, 3], [2.5, float("nan"), 4.5], label="speed")
        plt.title("Run"); plt.xlabel("Time (s)"); plt.ylabel("Speed [m/s]"); plt.yscale("log")
        plt.show()
        """
    ).results[0]
    assert base64.b64decode(result.png).startswith(b"\x89PNG") and not result.extra
    chart = result.chart
    assert isinstance(chart, LineChart) and (chart.title, chart.x_unit, chart.y_unit) == ("Run", "s", "m/s")
    assert (chart.elements[0].label, chart.elements[0].points) == ("speed", [(1.0, 2.5), (2.0, None), (3.0, 4.5)])
    assert (chart.x_scale, chart.y_scale) == ("linear", "log") and len(chart.x_ticks) == len(chart.x_tick_labels)


def test_charts_of_each_kind(sandbox):
    execution = sandbox.run_code(
        """
        import datetime
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(3, 3, figsize=(3, 3)); figure.suptitle("All")
        one, two, three, four, five, six, seven, eight, nine = axes.flat
        one.scatter([1, 2], [3, 4], label="dots")
        two.bar(["a", "b"], [5, 5], label="first"); two.bar(["a", "b"], [1, 2], bottom=[5, 5], label="second")
        three.barh(["a", "b"], [1, 2]); three.set_xlabel("how many")
        four.pie([90, 10], labels=["no", "yes"])
        five.boxplot([[1, 2, 3, 4, 20], [2, 3, 4, 5, 6]], patch_artist=True); five.set_xticklabels(["A", "B"])
        six.boxplot([[1, 2, 3, 4, 20]], vert=False)
        seven.plot([datetime.date(2024, 1, day) for day in (1, 2)], [1, 2])
        eight.imshow([[1, 2]]); eight.set_title("picture")
        nine.plot(["x", "y"], [1, 2])
        plt.show()
        """
    )
    chart = execution.results[0].chart
    assert isinstance(chart, SuperChart) and chart.title == "All"
    dots, bars, across, pie, boxes, box, times, picture, names = chart.elements
    assert isinstance(dots, ScatterChart) and dots.elements[0].points == [(1.0, 3.0), (2.0, 4.0)]
    assert isinstance(bars, BarChart)
    shown = [(bar.group, bar.label, bar.value) for bar in bars.elements]
    assert shown == [("first", "a", 5), ("first", "b", 5), ("second", "a", 1), ("second", "b", 2)]
    assert isinstance(across, BarChart) and across.y_label == "how many"
    assert [(bar.label, bar.value) for bar in across.elements] == [("a", 1), ("b", 2)]
    assert isinstance(pie, PieChart)
    assert [(part.label, part.angle, part.radius) for part in pie.elements] == [("no", 324, 1), ("yes", 36, 1)]
    assert isinstance(boxes, BoxAndWhiskerChart) and [one.label for one in boxes.elements] == ["A", "B"]
    for first in (boxes.elements[0], box.elements[0]):
        assert (first.min, first.first_quartile, first.median, first.third_quartile, first.max) == (1, 2, 3, 4, 4)
        assert first.outliers == [20]
    assert isinstance(times, LineChart) and times.x_scale == "datetime" and times.elements[0].points[0][0] == "2024-01-01"
    assert (picture.type, picture.title, picture.elements) == (ChartType.UNKNOWN, "picture", [])
    assert names.x_scale == "categorical" and names.elements[0].points == [("x", 1.0), ("y", 2.0)]


def test_a_table_is_html_and_its_data(sandbox):
    result = sandbox.run_code(
        """
        import pandas
        pandas.DataFrame({"a": [1, 2], "b": [0.5, None], "when": pandas.to_datetime(["2024-01-01", None]), 4: ["x", None]})
        """
    ).results[0]
    assert "<table" in result.html
    assert result.data == {"a": [1, 2], "b": [0.5, None], "when": ["2024-01-01T00:00:00", None], "4": ["x", None]}
    assert sandbox.run_code("{'a': [1, 'b']}").results[0].json == {"a": [1, "b"]}
    assert sandbox.run_code("'a ' 'text'").text == "a text"


def test_a_stuck_cell_is_left_by_restart_and_removal(sandbox):
    context = sandbox.create_code_context(cwd="/tmp")
    assert sandbox.run_code("import os; y = 1; os.getcwd()", context=context).text == "/tmp"
    assert sandbox.run_code("y").error.name == "NameError"
    stuck = Running(sandbox, STUCK, context=context)
    assert stuck.printed.wait(20)
    waiting = [Running(sandbox, "open('/tmp/ran', 'w')", context=context) for _ in range(2)]
    queued = "until curl -s 127.0.0.1:49999/contexts | grep -q '\"queued\": 2'; do sleep 0.2; done"
    sandbox.commands.run(queued, timeout=20)
    restart = threading.Thread(target=sandbox.restart_code_context, args=(context,))
    restart.start()
    for cell in (stuck, *waiting):
        assert cell.ended(within=10).error.name == "ContextRestarted"
    # Two at a time are one.
    sandbox.restart_code_context(context)
    restart.join(60)
    assert not restart.is_alive()
    assert sandbox.run_code("y", context=context).error.name == "NameError"
    assert not sandbox.files.exists("/tmp/ran")
    stuck = Running(sandbox, STUCK, context=context)
    assert stuck.printed.wait(20)
    sandbox.remove_code_context(context)
    assert stuck.ended(within=10).error.name == "ContextRemoved"
    assert context.id not in [one.id for one in sandbox.list_code_contexts()]
    with pytest.raises(SandboxException, match="not found"):
        sandbox.run_code("1", context=context)
    # Nothing of it is left: one kernel runs, with one directory.
    left = "ls -d /tmp/kelvin-kernels-1000/*; pgrep -fc '[i]pykernel_launcher'"
    assert len(sandbox.commands.run(left).stdout.split()) == 2 and sandbox.commands.run(left).stdout.endswith("\n1\n")


def test_environment_and_identity(sandbox):
    assert sandbox.run_code("import os; os.environ['E2B_SANDBOX_ID']").text == sandbox.sandbox_id
    assert sandbox.run_code("os.environ['ONE']", envs={"ONE": "1"}).text == "1"
    assert sandbox.run_code("os.environ.get('ONE')").text is None
    other = Sandbox.create("code-interpreter", timeout=60, envs={"MINE": "yes"})
    code = "import random; random.random()"
    assert other.run_code(code).text != sandbox.run_code(code).text
    assert other.run_code("import os; os.environ['MINE']").text == "yes"
    other.kill()


def test_a_deadline_interrupts_and_a_dead_kernel_is_replaced(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.run_code("import time; time.sleep(100)", timeout=2)
    assert sandbox.run_code("1 + 1").text == "2"
    assert sandbox.run_code("import os; os._exit(1)").error.name == "KernelDied"
    assert sandbox.run_code("1 + 2").text == "3"
    # One that ends while no cell runs is nobody's trouble.
    pid = sandbox.run_code("import os; os.getpid()").text
    ended = f"! kill -0 {pid} 2>/dev/null || grep -q '^State:.Z' /proc/{pid}/status"
    sandbox.commands.run(f"kill -9 {pid}; until {ended}; do sleep 0.1; done", user="root")
    assert sandbox.run_code("2 + 3", envs={"ONE": "1"}).text == "5"


def test_nobody_waits_for_a_stuck_cell(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.run_code(STUCK, timeout=2)
    execution = sandbox.run_code("6 * 7")
    assert execution.text == "42" and "its kernel was ended" in execution.logs.stderr[0]


@pytest.mark.parametrize(
    "language, name, code, printed, failing, variable",
    [
        ("bash", "bash", "x=41; echo $((x + 1))", "42\n", "false", "echo $ONE"),
        ("js", "javascript", "import { readFileSync } from 'fs'; console.log(typeof readFileSync)", "function\n", "null.x", "console.log(process.env.ONE)"),
        ("typescript", "typescript", "const n: number = 42; console.log(n)", "42\n", "null.x", "console.log(process.env.ONE)"),
        ("R", "r", "cat(6 * 7, '\\n')", "42 \n", "stop('no')", "cat(Sys.getenv('ONE'), '\\n', sep = '')"),
    ],
)
def test_other_languages(sandbox, language, name, code, printed, failing, variable):
    execution = sandbox.run_code(code, language=language)
    assert (execution.logs.stdout, execution.error) == ([printed], None)
    assert sandbox.run_code(failing, language=language).error is not None
    value = "it's \"1\" $HOME \\ \u00e9"
    assert sandbox.run_code(variable, language=language, envs={"ONE": value}).logs.stdout == [f"{value}\n"]
    # Its memory is for the next one.
    (context,) = [one for one in sandbox.list_code_contexts() if one.language == name]
    sandbox.remove_code_context(context)


def test_what_is_not_there_is_refused_by_name(sandbox):
    there = "there are: bash, javascript, python, r, typescript"
    with pytest.raises(SandboxException, match=f"'java' is not supported here; {there}"):
        sandbox.run_code("1", language="Java")
    with pytest.raises(SandboxException, match="'cobol' is not supported"):
        sandbox.create_code_context(language="cobol")
    with pytest.raises(SandboxException, match="is not a directory that this user may enter"):
        sandbox.create_code_context(cwd="/root")


def test_running_out_of_memory_ends_the_cell_alone(sandbox):
    sandbox.files.write("/home/user/kept", "kept")
    error = sandbox.run_code("b = []\nwhile True: b.append(bytearray(16 << 20))").error
    assert error.name == "KernelDied" and "out of memory" in error.value
    assert sandbox.run_code("open('/home/user/kept').read()").text == "kept"
