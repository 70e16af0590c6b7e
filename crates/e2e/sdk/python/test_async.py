"""The asynchronous client: what of it is its own, and many at once."""

import asyncio

import pytest
from conftest import newer, version
from e2b import AsyncSandbox, CommandExitException, FilesystemEventType, NotFoundException, SandboxState, TimeoutException
from e2b.sandbox.commands.command_handle import PtySize


def run(test):
    """Runs a coroutine with a sandbox that ends with it."""

    async def inside():
        sandbox = await AsyncSandbox.create("base", timeout=120)
        try:
            return await test(sandbox)
        finally:
            await sandbox.kill()

    return asyncio.run(inside())


def test_a_life():
    async def test(sandbox):
        assert await sandbox.is_running()
        assert (await sandbox.get_info()).state == SandboxState.RUNNING
        await sandbox.set_timeout(200)
        same = await AsyncSandbox.connect(sandbox.sandbox_id)
        assert (await same.commands.run("echo $((6 * 7))")).stdout == "42\n"
        assert await same.kill()
        assert not await sandbox.is_running()
        with pytest.raises(NotFoundException):
            await AsyncSandbox.connect(sandbox.sandbox_id)

    run(test)


def test_commands():
    async def test(sandbox):
        with pytest.raises(CommandExitException) as failed:
            await sandbox.commands.run("exit 4")
        assert failed.value.exit_code == 4
        with pytest.raises(TimeoutException):
            await sandbox.commands.run("sleep 50", timeout=1)
        results = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n in range(20)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]
        handle = await sandbox.commands.run("cat", background=True, stdin=True)
        await sandbox.commands.send_stdin(handle.pid, "in")
        await sandbox.commands.close_stdin(handle.pid)
        assert (await handle.wait()).stdout == "in"

    run(test)


def test_a_terminal():
    async def test(sandbox):
        seen = []

        async def see(data):
            seen.append(bytes(data))

        terminal = await sandbox.pty.create(PtySize(rows=20, cols=90), on_data=see)
        await sandbox.pty.send_stdin(terminal.pid, b"stty size; exit\n")
        assert (await terminal.wait()).exit_code == 0
        assert b"20 90" in b"".join(seen)

    run(test)


def test_files_and_a_watch_that_streams():
    async def test(sandbox):
        seen = asyncio.Queue()
        await sandbox.files.make_dir("w")
        handle = await sandbox.files.watch_dir("w", on_event=seen.put_nowait)
        await sandbox.files.write("w/f", "x")
        kinds = [(await asyncio.wait_for(seen.get(), 20)).type for _ in range(3)]
        assert kinds == [FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE]
        await handle.stop()
        data = bytes(range(256)) * 4096
        await sandbox.files.write("bytes", data)
        assert bytes(await sandbox.files.read("bytes", format="bytes")) == data

    run(test)


def test_pause_and_resume():
    async def test(sandbox):
        await sandbox.files.write("kept", "yes")
        assert await sandbox.pause() if version() >= (2, 50) else await sandbox.beta_pause()
        await sandbox.connect()
        assert await sandbox.files.read("kept") == "yes"

    run(test)


@newer((2, 50))
def test_forks():
    async def test(sandbox):
        await sandbox.files.write("kept", "yes")
        children = await sandbox.fork(count=2)
        assert [await child.files.read("kept") for child in children] == ["yes", "yes"]
        for child in children:
            await child.kill()

    run(test)
