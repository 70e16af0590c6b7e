"""The synchronous client: one test for each part of what it does."""

import gzip
import io
import json
import time
import urllib.error
import urllib.request

import pytest
from conftest import newer
from e2b import (
    AuthenticationException,
    CommandExitException,
    FileType,
    FilesystemEventType,
    InvalidArgumentException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    Template,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import PtySize


def test_a_life(make, tag):
    sandbox = make(metadata={"kind": "life"}, envs={"GREETING": "hello"}, timeout=60)
    assert sandbox.is_running()
    info = sandbox.get_info()
    assert (info.sandbox_id, info.state, info.metadata["kind"]) == (sandbox.sandbox_id, SandboxState.RUNNING, "life")
    assert info.cpu_count >= 1 and info.memory_mb >= 128 and info.envd_version
    assert sandbox.commands.run("echo $GREETING").stdout == "hello\n"
    sandbox.set_timeout(300)
    assert (sandbox.get_info().end_at - info.end_at).total_seconds() > 200
    same = Sandbox.connect(sandbox.sandbox_id)
    assert same.commands.run("echo again").stdout == "again\n"
    assert same.kill()
    assert not sandbox.is_running()
    assert not Sandbox.kill(sandbox.sandbox_id), "the second time there is nothing to kill"
    with pytest.raises(NotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_lists_have_filters_and_pages(make, tag):
    ids = [make().sandbox_id for _ in range(3)]
    query = SandboxQuery(metadata={"tag": tag})
    pages = Sandbox.list(query=query, limit=2)
    first, second = pages.next_items(), pages.next_items()
    assert [item.sandbox_id for item in first + second] == ids[::-1], "newest first"
    assert len(first) == 2 and not pages.has_next
    assert Sandbox.list(query=SandboxQuery(metadata={"tag": "nobody's"})).next_items() == []
    Sandbox.connect(ids[0]).pause()
    paused = Sandbox.list(query=SandboxQuery(metadata={"tag": tag}, state=[SandboxState.PAUSED])).next_items()
    assert [item.sandbox_id for item in paused] == ids[:1]


def test_commands(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2; pwd; whoami", cwd="/tmp", envs={"A": "1"})
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n/tmp\nuser\n", "err\n", 0)
    assert sandbox.commands.run("whoami; echo $HOME", user="root").stdout == "root\n/root\n"
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo gone; exit 7")
    assert (failed.value.exit_code, failed.value.stdout) == (7, "gone\n")
    with pytest.raises(AuthenticationException, match="invalid username"):
        sandbox.commands.run("true", user="nobody-here")
    seen = []
    sandbox.commands.run("for i in 1 2 3; do echo $i; done", on_stdout=seen.append)
    assert "".join(seen) == "1\n2\n3\n"


def test_a_command_in_the_background(sandbox):
    handle = sandbox.commands.run("cat; echo over", background=True, stdin=True)
    assert handle.pid in [process.pid for process in sandbox.commands.list()]
    sandbox.commands.send_stdin(handle.pid, "fed\n")
    handle.disconnect()
    again = sandbox.commands.connect(handle.pid)
    sandbox.commands.close_stdin(handle.pid)
    result = again.wait()
    assert result.stdout.endswith("over\n") and result.exit_code == 0
    sleeping = sandbox.commands.run("sleep 100", background=True)
    assert sandbox.commands.kill(sleeping.pid)
    assert not sandbox.commands.kill(999_999)
    with pytest.raises(CommandExitException):
        sleeping.wait()


def test_a_deadline_kills(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 77", timeout=1)
    deadline = time.monotonic() + 10
    while sandbox.commands.run("pgrep -c -f '^sleep 77' || true").stdout.strip() != "0":
        assert time.monotonic() < deadline, "it still runs"


def test_a_terminal(sandbox):
    seen = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), envs={"WHO": "me"})
    sandbox.pty.resize(terminal.pid, PtySize(rows=30, cols=111))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; echo $WHO-$TERM; exit 3\n")
    with pytest.raises(CommandExitException) as ended:
        terminal.wait(on_pty=lambda data: seen.append(bytes(data)))
    text = b"".join(seen).decode()
    assert ended.value.exit_code == 3 and "30 111" in text and "me-xterm-256color" in text


def test_files(sandbox):
    info = sandbox.files.write("a/b/c.txt", "content")
    assert info.path == "/home/user/a/b/c.txt"
    assert sandbox.files.read("a/b/c.txt") == "content"
    assert sandbox.files.read("a/b/c.txt", format="bytes") == b"content"
    assert sandbox.commands.run("stat -c '%U %a' a/b a/b/c.txt").stdout == "user 755\nuser 644\n"
    assert sandbox.files.exists("a/b/c.txt") and not sandbox.files.exists("a/b/d.txt")
    assert not sandbox.files.make_dir("a"), "it is there"
    sandbox.files.rename("a/b/c.txt", "a/d.txt")
    assert [(entry.name, entry.type) for entry in sandbox.files.list("a")] == [("b", FileType.DIR), ("d.txt", FileType.FILE)]
    assert len(sandbox.files.list("a", depth=2)) == 2
    sandbox.files.remove("a")
    sandbox.files.remove("a")
    with pytest.raises(NotFoundException):
        sandbox.files.read("a/d.txt")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write("/home/user", "a directory")
    many = sandbox.files.write_files([{"path": f"many/{n}", "data": str(n)} for n in range(20)])
    assert len(many) == 20 and sandbox.files.read("many/19") == "19"


@newer((2, 50))
def test_files_packed_and_with_metadata(sandbox):
    text = "packed " * 100_000
    info = sandbox.files.write("packed.txt", text, gzip=True, metadata={"author": "me"})
    assert info.metadata == {"author": "me"} and sandbox.files.get_info("packed.txt").metadata == {"author": "me"}
    assert sandbox.files.read("packed.txt", gzip=True) == text
    assert sandbox.files.write("packed.txt", "plain").metadata is None
    sandbox.files.write("stream.bin", io.BytesIO(b"x" * (3 << 20)), use_octet_stream=True)
    assert sandbox.files.get_info("stream.bin").size == 3 << 20


def test_watches(sandbox):
    sandbox.files.make_dir("watched")
    handle = sandbox.files.watch_dir("watched", recursive=True)
    sandbox.files.write("watched/new/file.txt", "x")
    events = handle.get_new_events()
    names = [(event.type, event.name) for event in events]
    assert (FilesystemEventType.CREATE, "new") in names and (FilesystemEventType.WRITE, "new/file.txt") in names
    sandbox.files.remove("watched/new/file.txt")
    assert (FilesystemEventType.REMOVE, "new/file.txt") in [(e.type, e.name) for e in handle.get_new_events()]
    handle.stop()
    with pytest.raises(NotFoundException):
        sandbox.files.watch_dir("not there")


def test_signed_urls(sandbox):
    sandbox.files.write("signed.txt", "by url")
    url = sandbox.download_url("signed.txt", "user", 60)
    assert urllib.request.urlopen(url).read() == b"by url"
    expired = sandbox.download_url("signed.txt", "user", -60)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(expired)
    assert json.loads(refused.value.read()) == {"code": 401, "message": "signature is already expired"}
    for forged in [url.replace("signed.txt", "other.txt"), url.replace("username=user", "username=root")]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(forged)
        assert refused.value.code == 401
    boundary = "b0"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nup\r\n--{boundary}--\r\n'
    upload = urllib.request.Request(
        sandbox.upload_url("up.txt", "user", 60),
        body.encode(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    assert json.loads(urllib.request.urlopen(upload).read())[0]["path"] == "/home/user/up.txt"
    assert sandbox.files.read("up.txt") == "up"


def test_pause_and_resume(make):
    sandbox = make()
    counter = sandbox.commands.run("python3 -c 'import time\nn = 0\nwhile True: n += 1; print(n, flush=True); time.sleep(0.05)' > n", background=True)
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert sandbox.pause()
    assert sandbox.get_info().state == SandboxState.PAUSED and not sandbox.is_running()
    sandbox.connect()
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") == boot
    assert counter.pid in [process.pid for process in sandbox.commands.list()], "it goes on"


@newer((2, 50))
def test_a_pause_of_the_disk_alone_reboots(make):
    sandbox = make()
    sandbox.files.write("kept", "on the disk")
    boot, machine = sandbox.files.read("/proc/sys/kernel/random/boot_id"), sandbox.files.read("/etc/machine-id")
    sandbox.commands.run("sleep 1000", background=True)
    assert sandbox.pause(keep_memory=False)
    sandbox.connect()
    assert sandbox.files.read("kept") == "on the disk"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") != boot
    assert sandbox.files.read("/etc/machine-id") == machine
    assert sandbox.commands.list() == []


@newer((2, 50))
def test_it_pauses_itself_and_traffic_brings_it_back(make):
    sandbox = make(timeout=120, lifecycle={"on_timeout": "pause", "auto_resume": True})
    sandbox.set_timeout(1)
    deadline = time.monotonic() + 30
    while sandbox.get_info().state != SandboxState.PAUSED:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert sandbox.commands.run("echo awake").stdout == "awake\n"
    assert sandbox.get_info().state == SandboxState.RUNNING


@newer((2, 50))
def test_snapshots_and_forks(make):
    sandbox = make()
    sandbox.files.write("state", "kept")
    snapshot = sandbox.create_snapshot()
    assert snapshot.snapshot_id in [item.snapshot_id for item in Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id).next_items()]
    copy = Sandbox.create(snapshot.snapshot_id, timeout=60)
    assert copy.files.read("state") == "kept"
    copy.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id)
    assert not Sandbox.delete_snapshot(snapshot.snapshot_id)
    children = sandbox.fork(count=2)
    for child in children:
        assert child.files.read("state") == "kept"
        child.kill()


def test_metrics(sandbox):
    metrics = sandbox.get_metrics()
    assert len(metrics) == 1
    one = metrics[0]
    assert one.cpu_count >= 1 and 0 < one.mem_used < one.mem_total and 0 < one.disk_used < one.disk_total


def test_git(sandbox):
    sandbox.commands.run("git init -q r && cd r && git config user.email a@b && git config user.name n && git commit -q --allow-empty -m first")
    status = sandbox.git.status("r")
    assert status.is_clean


def test_a_network_that_is_denied(make):
    sandbox = make(allow_internet_access=False)
    with pytest.raises(CommandExitException):
        sandbox.commands.run("curl -s -m 5 http://1.1.1.1")


def test_templates_exist_or_not():
    assert Template.exists("base")
    assert not Template.exists("no-such-template")


def test_what_is_wrong_says_so(make):
    with pytest.raises(AuthenticationException):
        Sandbox.create("base", api_key="e2b_" + "0" * 40)
    with pytest.raises((NotFoundException, SandboxException), match="no template"):
        Sandbox.create("no-such-template")
    with pytest.raises(SandboxException, match="volumeMounts|timeout"):
        make(timeout=10_000_000)


def test_what_is_not_there_is_refused_by_name(refuses):
    for what, fields, code in [
        ("`iam`", {"iam": {"role": "r"}}, "unsupported_field"),
        ("`volumeMounts`", {"volumeMounts": [{"name": "v", "path": "/v"}]}, "unsupported_field"),
        ("`network.egressProxy`", {"network": {"egressProxy": {"address": "192.0.2.1:1080"}}}, "unsupported_field"),
        ("`network.rules`", {"network": {"rules": {"example.com": []}}}, "unsupported_field"),
        ("`network.dnsServers`", {"network": {"dnsServers": ["192.0.2.1"]}}, "invalid_request"),
        ("`network.httpsPorts`", {"network": {"httpsPorts": [8443]}}, "invalid_request"),
        (
            "`autoResume` of a sandbox that would boot again",
            {"autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}},
            "invalid_lifecycle",
        ),
    ]:
        assert refuses(what, "POST", "/sandboxes", {"templateID": "base", **fields}) == (400, code)
    for what, method, path in [
        ("volumes", "GET", "/volumes"),
        ("secrets", "GET", "/secrets"),
        ("access tokens", "POST", "/access-tokens"),
    ]:
        assert refuses(what, method, path) == (404, "no_route")


def test_a_kill_cuts_the_stream(make):
    sandbox = make()
    handle = sandbox.commands.run("sleep 100", background=True)
    sandbox.kill()
    with pytest.raises(SandboxException):
        handle.wait()
