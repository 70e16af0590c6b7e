"""An agent's loop without a network and without a model: tool calls as LangChain and others make them, run in a sandbox
that reaches nothing.

A model would write `PLAN`; here it stands still, so that the example always does the same.
"""

from e2b import CommandExitException, Sandbox

PLAN = [
    {"name": "write_file", "args": {"path": "data.csv", "content": "name,score\nada,9\ngrace,7\n"}},
    {"name": "run", "args": {"command": "python3 -c 'import csv; print(sum(int(r[\"score\"]) for r in csv.DictReader(open(\"data.csv\"))))'"}},
    {"name": "run", "args": {"command": "curl -s -m 2 http://example.com"}},
    {"name": "read_file", "args": {"path": "data.csv"}},
]


def tools(sandbox):
    """What the model may call, by name."""

    def run(command):
        try:
            return sandbox.commands.run(command, timeout=30).stdout
        except CommandExitException as failed:
            return f"exit code {failed.exit_code}: {failed.stderr}"

    return {
        "run": run,
        "write_file": lambda path, content: sandbox.files.write(path, content).path,
        "read_file": lambda path: sandbox.files.read(path),
    }


with Sandbox.create("base", timeout=120, allow_internet_access=False) as sandbox:
    available = tools(sandbox)
    for call in PLAN:
        print(f"{call['name']}: {available[call['name']](**call['args'])!r}")
