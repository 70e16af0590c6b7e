"""The code interpreter's client."""

import base64
import time

import pytest
from e2b import SandboxException, TimeoutException
from e2b_code_interpreter import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox.create("code-interpreter", timeout=300)
    yield sandbox
    sandbox.kill()


def test_cells_keep_state(sandbox):
    assert sandbox.run_code("x = 41").error is None
    execution = sandbox.run_code("print('shown'); x + 1")
    assert (execution.text, execution.logs.stdout, execution.execution_count) == ("42", ["shown\n"], 2)


def test_errors_are_told(sandbox):
    error = sandbox.run_code("1 / 0").error
    assert (error.name, error.value) == ("ZeroDivisionError", "division by zero") and "ZeroDivisionError" in error.traceback


def test_output_streams(sandbox):
    seen = []
    sandbox.run_code(
        "import time\nfor n in range(3): print(n, flush=True); time.sleep(0.5)",
        on_stdout=lambda message: seen.append((time.monotonic(), message.line)),
    )
    assert [line for _, line in seen] == ["0\n", "1\n", "2\n"] and seen[2][0] - seen[0][0] > 0.5


def test_a_chart_is_a_png_and_a_table_is_html(sandbox):
    execution = sandbox.run_code("import matplotlib.pyplot as plt; plt.plot([1, 2, 3]); plt.show()")
    assert base64.b64decode(execution.results[0].png).startswith(b"\x89PNG")
    execution = sandbox.run_code("import pandas; pandas.DataFrame({'a': [1]})")
    assert "<table" in execution.results[0].html


def test_contexts_are_apart(sandbox):
    context = sandbox.create_code_context(cwd="/tmp")
    assert sandbox.run_code("import os; y = 1; os.getcwd()", context=context).text == "'/tmp'"
    assert sandbox.run_code("y").error.name == "NameError"
    sandbox.restart_code_context(context)
    assert sandbox.run_code("y", context=context).error.name == "NameError"
    sandbox.remove_code_context(context)
    with pytest.raises(SandboxException):
        sandbox.run_code("1", context=context)


def test_environment_and_identity(sandbox):
    assert sandbox.run_code("import os; os.environ['E2B_SANDBOX_ID']").text == repr(sandbox.sandbox_id)
    assert sandbox.run_code("os.environ['ONE']", envs={"ONE": "1"}).text == "'1'"
    assert sandbox.run_code("os.environ.get('ONE')").text is None
    other = Sandbox.create("code-interpreter", timeout=60, envs={"MINE": "yes"})
    code = "import random; random.random()"
    assert other.run_code(code).text != sandbox.run_code(code).text
    assert other.run_code("import os; os.environ['MINE']").text == "'yes'"
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


def test_other_languages_are_refused(sandbox):
    with pytest.raises(SandboxException, match="not supported"):
        sandbox.run_code("1", language="r")
