"""One Jupyter kernel: a process, its channels, and the messages of one cell at a time.

    start() -> run cells with messages(), code of ours with silent() -> stop()

`died` is done as soon as the process has ended, for whatever reason. Everything a kernel has on the disk is in one directory
under `BASE`, which `stop` removes; what a crash of the service leaves there, `sweep` ends and removes at its next start.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

import languages

BASE = os.path.join(tempfile.gettempdir(), f"kelvin-kernels-{os.getuid()}")
# Seconds that a kernel may take to start; half a minute was seen on an emulated machine with other work.
START_LIMIT = 60
# Seconds for code of ours.
SILENT_LIMIT = 60
# Seconds between an interrupt and the end of the kernel, when it is stopped while a cell runs.
GRACE = 1
# Seconds for the kernel's answer after a cell, and for output of a kernel that has ended.
TAIL_LIMIT = 2
# Languages whose kernels are known to listen on sockets in the file system; others listen on 127.0.0.1.
ON_FILES = {"python", "bash", "r"}
# How much rather a kernel is ended than its service when memory is short. Source: proc_pid_oom_score_adj(5).
OOM_SCORE_ADJ = 300
TEXTS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/javascript": "javascript",
}
VALUES = {"application/json": "json", "e2b/data": "data", "e2b/chart": "chart"}


class Died(Exception):
    """The kernel has ended; the text says how."""


def specs():
    """The kernels that are installed."""
    return KernelSpecManager().get_all_specs()


class Kernel:
    """A process that runs cells of one language."""

    def __init__(self, name, language, cwd):
        self.name = name
        self.language = language
        self.cwd = cwd
        self.manager = None
        self.client = None
        self.died = asyncio.get_running_loop().create_future()
        self.directory = None
        self.descriptor = None
        # The message whose cell runs, until the kernel is idle again.
        self.request = None
        self.kills = 0
        # Whether it has started and is set up; for which machine.
        self.prepared = False
        self.stopped = False
        self.identity = None
        self.reason = None

    @property
    def works(self):
        """Whether cells can be run."""
        return self.prepared and not self.died.done()

    async def start(self, environment):
        """Starts the process with `environment` over the service's own, and waits until it answers."""
        os.makedirs(BASE, mode=0o700, exist_ok=True)
        self.directory = tempfile.mkdtemp(dir=BASE)
        self.manager = AsyncKernelManager(
            kernel_name=self.name, connection_file=os.path.join(self.directory, "connection.json")
        )
        if self.language in ON_FILES:
            self.manager.transport, self.manager.ip = "ipc", os.path.join(self.directory, "socket")
        environment = {**os.environ, **environment}
        if self.language == "r":
            # R keeps a directory there for as long as it runs, and leaves it when it is killed.
            environment["TMPDIR"] = self.directory
        try:
            await self.manager.start_kernel(cwd=self.cwd, env=environment)
            self._watch(self.manager.provisioner.process.pid)
            self.client = self.manager.client()
            self.client.start_channels()
            ready = asyncio.ensure_future(self.client.wait_for_ready(timeout=START_LIMIT))
            await self._before_death(ready)
        except (RuntimeError, OSError, KeyError) as error:
            raise Died(f"the kernel {self.name} for {self.language} did not start: {error}") from error

    def _watch(self, pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE_ADJ))
        self.kills = oom_kills()
        self.descriptor = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self.descriptor, self._ended)

    def _ended(self):
        asyncio.get_running_loop().remove_reader(self.descriptor)
        if not self.died.done():
            self.died.set_result(None)

    async def _before_death(self, task):
        """What `task` returns; `Died` when the kernel ends before."""
        try:
            await asyncio.wait({task, self.died}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Died(await self.why())
            return task.result()
        finally:
            if not task.done():
                task.cancel()

    async def why(self):
        """How the process ended."""
        if self.reason:
            return self.reason
        status = await self.manager.provisioner.poll()
        if status == -signal.SIGKILL and oom_kills() > self.kills:
            return f"the {self.language} kernel was killed: the sandbox ran out of memory"
        if status == -signal.SIGKILL:
            return f"the {self.language} kernel was killed (SIGKILL), probably because the sandbox ran out of memory"
        if status is not None and status < 0:
            return f"the {self.language} kernel was ended by {signal.Signals(-status).name}"
        return f"the {self.language} kernel has exited with status {status}"

    async def interrupt(self):
        """Interrupts what runs; no error when the kernel has ended."""
        with contextlib.suppress(RuntimeError, ProcessLookupError):
            await self.manager.interrupt_kernel()

    def kill(self, reason=None):
        """Ends the process and its group at once, also what of the group is left; `stop` is still due."""
        self.reason = self.reason or reason
        group = getattr(self.manager.provisioner, "pgid", None)
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)

    async def stop(self):
        """Interrupts a cell that runs, waits `GRACE`, ends the process, and removes what it has. Safe at every state."""
        if self.stopped:
            return
        if self.request and not self.died.done():
            await self.interrupt()
            idle = asyncio.ensure_future(self._idle(self.request))
            await asyncio.wait({idle, self.died}, timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
            await asyncio.gather(idle, return_exceptions=True)
        if self.client:
            self.client.stop_channels()
        if self.manager and self.manager.provisioner:
            self.kill()
            await self.manager.shutdown_kernel(now=True)
        if self.descriptor is not None:
            asyncio.get_running_loop().remove_reader(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.stopped = True

    async def _idle(self, request):
        while True:
            message = await self.client.get_iopub_msg()
            if message["parent_header"].get("msg_id") == request and is_idle(message):
                return
            # Messages that are there already come without a pause: others have to have their turn.
            await asyncio.sleep(0)

    async def silent(self, code):
        """Runs code of ours; nobody sees it. `Died` when the kernel ends or refuses it."""
        work = self.client.execute_interactive(
            code, silent=True, store_history=False, allow_stdin=False, output_hook=lambda _: None, timeout=SILENT_LIMIT
        )
        try:
            content = (await self._before_death(asyncio.ensure_future(work)))["content"]
        except TimeoutError as error:
            raise Died(f"the {self.language} kernel did not answer in {SILENT_LIMIT} s") from error
        if content["status"] != "ok":
            raise Died(f"the {self.language} kernel does not work: {content.get('ename')}: {content.get('evalue')}")

    async def messages(self, code):
        """The messages of one cell as the clients expect them, until it has ended. `Died` when the kernel ends first."""
        self.kills = oom_kills()
        request = self.request = self.client.execute(code, store_history=True, allow_stdin=False)
        failed = False
        while True:
            waiting = asyncio.ensure_future(self.client.get_iopub_msg())
            try:
                await asyncio.wait({waiting, self.died}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    # What it printed before is on its way.
                    await asyncio.wait({waiting}, timeout=TAIL_LIMIT / 4)
                if not waiting.done():
                    raise Died(await self.why())
                message = waiting.result()
            finally:
                waiting.cancel()
            if message["parent_header"].get("msg_id") != request:
                continue
            if is_idle(message):
                async for late in self._late(request):
                    yield late
                self.request = None
                # Some kernels tell an error in their answer alone.
                error = await self._answer(request)
                if error and not failed:
                    yield error
                return
            translated = translate(message["msg_type"], message["content"])
            if translated:
                failed = failed or translated["type"] == "error"
                yield translated

    async def _late(self, request):
        """What a kernel tells of a cell after it has said that the cell has ended: Deno sends results and output each on its way.

        A mark on both ways comes after all of it. Output on its way is taken for that of the mark, so both count.
        """
        if os.path.basename(self.manager.kernel_spec.argv[0]) != "deno":
            return
        mark = uuid.uuid4().hex
        marker = self.client.execute(languages.DENO_MARK.replace("{mark}", mark), silent=True, store_history=False)
        deadline, awaited = time.monotonic() + TAIL_LIMIT, {"stream", "display_data"}
        while awaited:
            waiting = asyncio.ensure_future(self.client.get_iopub_msg())
            left = max(deadline - time.monotonic(), 0)
            await asyncio.wait({waiting, self.died}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                return
            message = waiting.result()
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") not in (request, marker):
                continue
            if kind == "stream" and mark in content["text"]:
                awaited.discard(kind)
                content["text"] = content["text"].replace(f"{mark}\n", "")
                if not content["text"]:
                    continue
            elif kind == "display_data" and mark in content["data"]:
                awaited.discard(kind)
                continue
            elif kind not in ("stream", "display_data", "execute_result", "error"):
                continue
            yield translate(kind, content)

    async def _answer(self, request):
        """The error in the kernel's answer to `request`, if there is one."""
        deadline = time.monotonic() + TAIL_LIMIT
        while time.monotonic() < deadline:
            waiting = asyncio.ensure_future(self.client.get_shell_msg())
            done, _ = await asyncio.wait({waiting, self.died}, timeout=TAIL_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if waiting not in done:
                waiting.cancel()
                return None
            reply = waiting.result()
            if reply["parent_header"].get("msg_id") != request:
                continue
            content = reply["content"]
            if content.get("status") == "error":
                return translate("error", content)
            if content.get("status") in ("abort", "aborted"):
                return error_event("KeyboardInterrupt", "the cell was interrupted")
            return None
        return None


def is_idle(message):
    return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


def error_event(name, value, traceback=""):
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def stream_event(name, text):
    return {"type": name, "text": text, "timestamp": time.time_ns()}


def translate(kind, content):
    """A message of a kernel as the clients expect it."""
    if kind == "stream":
        return stream_event(content["name"], content["text"])
    if kind in ("display_data", "execute_result"):
        result = {"type": "result", "is_main_result": kind == "execute_result"}
        for mime, value in content["data"].items():
            if mime in TEXTS:
                result[TEXTS[mime]] = "".join(value) if isinstance(value, list) else value
            elif mime in VALUES:
                # A chart of nothing is none.
                if value or mime == "application/json":
                    result[VALUES[mime]] = value
            else:
                result.setdefault("extra", {})[mime] = value
        text = result.get("text", "")
        # Clients see the text of a text, not how it is written in a program.
        if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]:
            result["text"] = text[1:-1]
        return result
    if kind == "error":
        trace = "\n".join(content.get("traceback") or [])
        return error_event(content.get("ename") or "Error", content.get("evalue") or "", trace)
    if kind == "execute_input":
        return {"type": "number_of_executions", "execution_count": content["execution_count"]}
    return None


def oom_kills():
    """How many processes the kernel has killed for memory since it booted. Source: proc(5), `/proc/vmstat`."""
    with contextlib.suppress(OSError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def sweep():
    """Ends kernels that a crash of the service left, and removes what they had."""
    mark = os.path.join(BASE, "").encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if mark in file.read():
                os.kill(int(pid), signal.SIGKILL)
    shutil.rmtree(BASE, ignore_errors=True)
