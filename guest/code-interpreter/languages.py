"""What differs from language to language: names, and how a kernel is given an environment.

Kernels are found by their Jupyter kernelspecs, so the image decides which languages there are; this module only adds to
what a kernelspec says. A language that is not in `SETTERS` runs cells all the same; `env_vars` are refused for it by name.
"""

import json
import re
import secrets
import shlex

# Names that people use for a language, beside its own.
ALIASES = {
    "js": "javascript",
    "ts": "typescript",
    "py": "python",
    "python3": "python",
    "sh": "bash",
    "shell": "bash",
}
# A kernel of the left language runs the right ones too.
ALSO = {"typescript": ("javascript",)}
# What a shell takes as the name of a variable. Source: POSIX.1-2017, 3.235.
SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def normalize(language):
    """The name by which a language is known here; `None` and "" are Python, as E2B's clients expect."""
    language = (language or "python").strip().lower()
    return ALIASES.get(language, language)


def installed(specs):
    """Maps each language to the name of the kernel that runs it. `specs` is what `KernelSpecManager.get_all_specs` returns.

    A kernel that is named for the language comes before one that only says that it runs it, and that before one that runs
    it too.
    """
    ranked = {}
    for kernel, found in sorted(specs.items()):
        own = normalize(str(found["spec"].get("language") or kernel))
        candidates = {own: 1, **{other: 2 for other in ALSO.get(own, ())}}
        named = normalize(kernel)
        if named in candidates:
            candidates[named] = 0
        for language, rank in candidates.items():
            if language not in ranked or rank < ranked[language][0]:
                ranked[language] = (rank, kernel)
    return {language: kernel for language, (_, kernel) in sorted(ranked.items())}


def wrong_variable(language, variables):
    """Why `variables` cannot be given to a kernel of `language`, or `None`."""
    if variables and language not in SETTERS:
        return f"env_vars are not supported for the language {language!r}; there they are for {', '.join(sorted(SETTERS))}"
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            return f"env_vars: {name[:80]!r} is no environment variable: a name has no '=', and neither has a NUL"
        try:
            (name + value).encode()
        except UnicodeEncodeError:
            return f"env_vars: {name[:80]!r} is not Unicode text"
        if language == "bash" and not SHELL_NAME.match(name):
            return f"env_vars: {name[:80]!r} is not a name that bash can export"
    return None


def set_for_good(language, variables):
    """Code that sets `variables`; `None` when there is no way."""
    return SETTERS[language][0](variables) if variables and language in SETTERS else None


def reseed(language):
    """Code that renews what randomness a kernel has, after a restore; `None` when there is no way."""
    code = RESEED.get(language)
    return code and code.replace("{seed}", str(secrets.randbelow(1 << 31)))


def set_for_a_cell(language, variables):
    """Code that sets `variables` and keeps what was there."""
    return SETTERS[language][1](variables)


def set_back(language, variables):
    """Code that undoes `set_for_a_cell`."""
    return SETTERS[language][2](variables)


def _python(variables):
    return f"import os as _kelvin_os; _kelvin_os.environ.update({variables!r}); del _kelvin_os"


def _python_keep(variables):
    return (
        "import os as _kelvin_os; _kelvin_before = "
        f"{{name: _kelvin_os.environ.get(name) for name in {list(variables)!r}}}; "
        f"_kelvin_os.environ.update({variables!r}); del _kelvin_os"
    )


def _python_back(_):
    return (
        "import os as _kelvin_os\n"
        "for _kelvin_name, _kelvin_value in _kelvin_before.items():\n"
        "    if _kelvin_value is None: _kelvin_os.environ.pop(_kelvin_name, None)\n"
        "    else: _kelvin_os.environ[_kelvin_name] = _kelvin_value\n"
        "del _kelvin_os, _kelvin_before, _kelvin_name, _kelvin_value"
    )


def _bash(variables):
    return "; ".join([*(f"export {name}={_bash_text(value)}" for name, value in variables.items()), ":"])


def _bash_keep(variables):
    kept = (f"[[ -v {name} ]] && _kelvin_before_{name}=${name}" for name in variables)
    return "; ".join([*kept, _bash(variables)])


def _bash_back(variables):
    back = (
        f"if [[ -v _kelvin_before_{name} ]]; then {name}=$_kelvin_before_{name}; unset _kelvin_before_{name}; else unset {name}; fi"
        for name in variables
    )
    return "; ".join([*back, ":"])


def _bash_text(value):
    # The kernel types into a terminal: a line break or a tab in quotes would be taken as a key.
    if value.isprintable():
        return shlex.quote(value)
    escaped = "".join(
        character if character.isprintable() and character not in "\\'" else "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in value
    )
    return f"$'{escaped}'"


# `process.env` is Node's; Deno has it too. The symbol is seen by no cell that does not look for it.
def _javascript(variables):
    return f"Object.assign(process.env, {json.dumps(variables)}); undefined"


def _javascript_keep(variables):
    names = json.dumps(list(variables))
    kept = f"globalThis[Symbol.for('kelvin.before')] = {names}.map((name) => [name, process.env[name]])"
    return f"{kept}; {_javascript(variables)}"


def _javascript_back(_):
    return (
        "globalThis[Symbol.for('kelvin.before')].forEach(([name, value]) => "
        "{ if (value === undefined) delete process.env[name]; else process.env[name] = value }); undefined"
    )


# R reads the escapes of JSON, but not surrogate pairs. A name with a dot is not listed by `ls()`.
def _r(variables):
    pairs = ", ".join(f"{_r_name(name)} = {json.dumps(value, ensure_ascii=False)}" for name, value in variables.items())
    return f"invisible(Sys.setenv({pairs}))"


def _r_keep(variables):
    names = ", ".join(json.dumps(name, ensure_ascii=False) for name in variables)
    return f".kelvin_before <- Sys.getenv(c({names}), unset = NA, names = TRUE); {_r(variables)}"


def _r_back(_):
    return (
        "Sys.unsetenv(names(.kelvin_before)[is.na(.kelvin_before)]); "
        "if (any(!is.na(.kelvin_before))) do.call(Sys.setenv, as.list(.kelvin_before[!is.na(.kelvin_before)])); "
        "rm(.kelvin_before)"
    )


def _r_name(name):
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


# Says `{mark}` on the way of output and on that of results.
DENO_MARK = "console.log('{mark}'); await Deno.jupyter.broadcast('display_data', {data: {'{mark}': ''}, metadata: {}, transient: {}}); undefined"

_JAVASCRIPT = (_javascript, _javascript_keep, _javascript_back)
# How a kernel is given variables: for good, for one cell, and back.
SETTERS = {
    "python": (_python, _python_keep, _python_back),
    "bash": (_bash, _bash_keep, _bash_back),
    "javascript": _JAVASCRIPT,
    "typescript": _JAVASCRIPT,
    "r": (_r, _r_keep, _r_back),
}
# After a restore: what has random state of its own, and a way to renew it. `{seed}` is new each time.
RESEED = {
    "python": (
        "def _kelvin_reseed():\n"
        "    import sys\n"
        "    if 'random' in sys.modules: sys.modules['random'].seed()\n"
        "    if 'numpy' in sys.modules: sys.modules['numpy'].random.seed()\n"
        "_kelvin_reseed(); del _kelvin_reseed"
    ),
    "bash": "RANDOM={seed}",
    "r": "set.seed({seed})",
}
