"""E2B's own command line client, as its users run it. KELVIN_E2E_CLI names the program, KELVIN_E2E_NODE its Node.js."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import termios
import threading
import time

import e2b
import pytest

LIMIT = 60


@pytest.fixture
def environment(tmp_path):
    """Without what somebody has logged in with."""
    return {**os.environ, "HOME": str(tmp_path), "NO_COLOR": "1"}


@pytest.fixture
def command():
    return [os.environ["KELVIN_E2E_NODE"], os.environ["KELVIN_E2E_CLI"]]


@pytest.fixture
def cli(command, environment):
    def run(*arguments, stdin=subprocess.DEVNULL, status=0):
        feed = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
        done = subprocess.run([*command, *arguments], capture_output=True, env=environment, timeout=LIMIT, **feed)
        assert done.returncode == status, (arguments, done)
        return done.stdout.decode()

    return run


@pytest.fixture
def listed(cli, tag):
    """Ids of this test's sandboxes, as `list` has them with more options."""

    def ids(*options):
        found = json.loads(cli("sandbox", "list", "--metadata", f"tag={tag}", "--format", "json", *options))
        return {item["sandboxId"]: item["state"] for item in found}

    return ids


def test_list(make, cli, listed, tag):
    sandbox, other = make(), make(metadata={"more": "yes"})
    assert listed() == {sandbox.sandbox_id: "running", other.sandbox_id: "running"}
    assert listed("--template", "base", "--limit", "1", "--order", "asc") == {sandbox.sandbox_id: "running"}
    assert listed("--template", "no-such-template") == {}
    assert listed("--started-after", "2100-01-01T00:00:00Z") == {}
    assert json.loads(cli("sandbox", "list", "-m", f"tag={tag},more=yes", "-f", "json"))[0]["sandboxId"] == other.sandbox_id
    table = cli("sandbox", "list", "--metadata", f"tag={tag}")
    assert "SANDBOX ID" in table.upper() and sandbox.sandbox_id in table and "Running" in table
    sandbox.pause()
    assert listed() == {other.sandbox_id: "running"}
    assert listed("--state", "paused") == {sandbox.sandbox_id: "paused"}
    assert len(listed("--state", "running,paused")) == 2


def test_create_and_info(cli):
    made = cli("sandbox", "create", "--detach", "--lifecycle.ontimeout", "pause", "--lifecycle.autoresume", "--timeout", "60", "base")
    known = {item["sandboxId"] for item in json.loads(cli("sandbox", "list", "--format", "json"))}
    (sandbox,) = (word for word in made.split() if word in known)
    info = json.loads(cli("sandbox", "info", "--format", "json", sandbox))
    assert info["state"] == "running" and info["lifecycle"] == {"onTimeout": "pause", "autoResume": True}
    cli("sandbox", "kill", sandbox)
    cli("sandbox", "info", sandbox, status=1)


def test_exec(sandbox, cli):
    run = ("sandbox", "exec")
    assert cli(*run, sandbox.sandbox_id, "echo $((6 * 7))") == "42\n"
    assert cli(*run, sandbox.sandbox_id, "--", "sh", "-c", "echo out; echo err >&2; exit 7", status=7) == "out\n"
    assert cli(*run, sandbox.sandbox_id, "no-such-command", status=127) == ""
    assert cli(*run, "-u", "root", "-c", "/tmp", "-e", "A=b c", sandbox.sandbox_id, 'echo "$(id -un) $PWD $A"') == "root /tmp b c\n"
    big = bytes(range(256)) * 4096
    assert cli(*run, sandbox.sandbox_id, "wc -c", stdin=big) == f"{len(big)}\n"
    assert cli(*run, sandbox.sandbox_id, "cat", stdin=b"no newline at the end") == "no newline at the end"
    cli(*run, "--background", sandbox.sandbox_id, "sleep 1000")
    assert [process.args[-1] for process in sandbox.commands.list()] == ["sleep 1000"]
    cli(*run, "-u", "nobody-of-that-name", sandbox.sandbox_id, "id", status=1)
    cli(*run, "no-such-sandbox", "id", status=1)


def converse(program, environment, steps, columns=123):
    """Runs a program on a terminal: at each prompt (`$ `) it is sent the next of `steps`. What it showed, and its status."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(program[0], program, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown, answered, steps, end = b"", 0, list(steps), time.monotonic() + LIMIT
    try:
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            if steps and b"$ " in shown[answered:]:
                os.write(terminal, steps.pop(0).encode())
                answered = len(shown)
        else:
            os.kill(pid, 9)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(status)


def test_connect(sandbox, command, environment):
    connect = [*command, "sandbox", "connect", "--cwd", "/tmp", "--env", "FOO=bar", sandbox.sandbox_id]
    shown, status = converse(connect, environment, ["stty size; echo $FOO-$TERM; pwd\n", "exit\n"])
    assert status == 0 and "40 123" in shown and "bar-xterm-256color" in shown and "\n/tmp\r" in shown, shown
    # A shell that is killed ends the terminal, quietly.
    shown, status = converse([*command, "sandbox", "connect", sandbox.sandbox_id], environment, ["kill -9 $$\n"])
    assert status == 0 and "Error" not in shown, shown
    assert sandbox.is_running()


def test_logs(sandbox, cli, command, environment):
    def log(text):
        sandbox.commands.run(f"echo {text} > /dev/console", user="root")

    def entries(text):
        return [json.loads(line) for line in text.splitlines() if line]

    read = ("sandbox", "logs", "--format", "json", sandbox.sandbox_id)
    log("first-line")
    first = [entry for entry in entries(cli(*read)) if "first-line" in json.dumps(entry)]
    assert len(first) == 1 and first[0]["level"].strip().upper() == "INFO", first
    # Reading takes nothing away, and a line keeps its time.
    assert [entry for entry in entries(cli(*read)) if "first-line" in json.dumps(entry)] == first
    assert "first-line" in cli("sandbox", "logs", sandbox.sandbox_id)
    assert "first-line" not in cli(*read, "--level", "error")
    with subprocess.Popen([*command, *read, "--follow"], env=environment, stdout=subprocess.PIPE) as following:
        # Lines that never come end with the program.
        alarm = threading.Timer(LIMIT, following.kill)
        alarm.start()
        try:
            seen = []
            for awaited in (b"first-line", b"second-line"):
                while not (seen and awaited in seen[-1]):
                    seen.append(following.stdout.readline())
                    assert seen[-1], seen
                if awaited == b"first-line":
                    log("second-line")
            # It follows until the sandbox runs no more.
            sandbox.pause()
            seen += following.stdout.readlines()
            assert following.wait() == 0
            assert [sum(text in line for line in seen) for text in (b"first-line", b"second-line")] == [1, 1], seen
        finally:
            alarm.cancel()
            following.kill()
    assert "second-line" in cli(*read), "the log of a paused sandbox is there"


def test_metrics(sandbox, cli):
    read = ("sandbox", "metrics", sandbox.sandbox_id)
    end = time.monotonic() + LIMIT
    while not (lines := [json.loads(line) for line in cli(*read, "--format", "json").splitlines() if line]):
        assert time.monotonic() < end, "no measurement"
    first = lines[0]
    assert first["cpuCount"] == 1 and 0 < first["memUsed"] < first["memTotal"] and 0 < first["diskUsed"] < first["diskTotal"]
    assert "CPU" in cli(*read) and "MiB" in cli(*read)
    cli("sandbox", "metrics", "no-such-sandbox", status=1)


def test_pause_and_resume(sandbox, cli, listed):
    sandbox.commands.run("echo kept > note")
    assert "has been paused" in cli("sandbox", "pause", sandbox.sandbox_id)
    assert "already paused" in cli("sandbox", "pause", sandbox.sandbox_id)
    assert listed("--state", "paused") == {sandbox.sandbox_id: "paused"}
    assert "has been resumed" in cli("sandbox", "resume", sandbox.sandbox_id)
    assert listed() == {sandbox.sandbox_id: "running"}
    assert cli("sandbox", "exec", sandbox.sandbox_id, "cat note") == "kept\n"
    cli("sandbox", "pause", "no-such-sandbox", status=1)
    cli("sandbox", "resume", "no-such-sandbox", status=1)


def test_kill(make, cli, listed, tag):
    one, two, paused = make(), make(), make()
    paused.pause()
    cli("sandbox", "kill", one.sandbox_id)
    assert not one.is_running() and listed() == {two.sandbox_id: "running"}
    assert "Killed 1 " in cli("sandbox", "kill", "--all", "--metadata", f"tag={tag}")
    assert listed("--state", "running,paused") == {paused.sandbox_id: "paused"}
    assert "Killed 1 " in cli("sandbox", "kill", "--all", "--state", "paused", "--metadata", f"tag={tag}")
    assert listed("--state", "running,paused") == {}
    with pytest.raises(e2b.NotFoundException):
        e2b.Sandbox.connect(two.sandbox_id)


def test_snapshots_and_templates(sandbox, cli, tag):
    cli("sandbox", "snapshot", "create", "--name", f"cli-{tag}", sandbox.sandbox_id)
    (snapshot,) = json.loads(cli("sandbox", "snapshot", "list", "--format", "json", sandbox.sandbox_id))
    assert snapshot["names"] == [f"cli-{tag}"]
    cli("sandbox", "snapshot", "delete", snapshot["snapshotId"])
    assert json.loads(cli("sandbox", "snapshot", "list", "--format", "json", sandbox.sandbox_id)) == []
    names = [name for template in json.loads(cli("template", "list", "--format", "json")) for name in template["names"]]
    assert "base" in names
