"""Runs cells: `/execute` and `/contexts` on port 49999, over Jupyter kernels.

    serve   the service
    wait    ends when the service runs cells

A context is one kernel: a process of its own, with the state of its cells. Output is streamed, a line of JSON for each
message. One cell at a time in each context; a client that goes away interrupts its cell. Nothing is written to disk; a
crash of the service ends the kernels with it, and the agent starts it again.
"""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
import uuid

from jupyter_client.manager import AsyncKernelManager
from tornado import iostream, web

PORT = 49999
HOME = "/home/user"
IDENTITY = "/proc/sys/kernel/random/boot_id"
ENVIRONMENT = "/run/kelvin/code-interpreter.env"
# Kernels at one time; each takes about 60 MiB.
MAX_CONTEXTS = 32
# Bytes of one request.
MAX_BODY = 16 << 20
# Seconds that the new environment may be on its way after a restore.
IDENTITY_LIMIT = 5
# What a first plot would load, loaded before the snapshot.
WARM_UP = "import matplotlib.pyplot, numpy, pandas; get_ipython().run_line_magic('matplotlib', 'inline'); matplotlib.pyplot.plot([0, 1]); matplotlib.pyplot.close('all'); del matplotlib, numpy, pandas"
# After a restore: modules that are loaded and keep random state of their own.
RENEW = """
def _renew(environment):
    import os, sys
    os.environ.update(environment)
    if "random" in sys.modules: sys.modules["random"].seed()
    if "numpy" in sys.modules: sys.modules["numpy"].random.seed()
_renew({environment}); del _renew
"""
MIME = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
}


class Refused(Exception):
    """What the caller is told, with a status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Context:
    """One kernel."""

    def __init__(self, cwd):
        self.id = str(uuid.uuid4())
        self.cwd = cwd
        self.lock = asyncio.Lock()
        self.manager = None
        self.client = None
        self.identity = None

    async def start(self, identity, environment):
        self.manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"/tmp/kelvin-{self.id}")
        await self.manager.start_kernel(cwd=self.cwd, env={**os.environ, **environment})
        self.client = self.manager.client()
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=60)
        self.identity = identity

    async def stop(self):
        if self.client:
            self.client.stop_channels()
        if self.manager:
            await self.manager.shutdown_kernel(now=True)
            self.manager.cleanup_connection_file()

    def describe(self):
        return {"id": self.id, "language": "python", "cwd": self.cwd}

    async def silent(self, code):
        """Runs code of ours; nobody sees it."""
        reply = await self.client.execute_interactive(
            code, silent=True, store_history=False, output_hook=lambda _: None, timeout=60
        )
        content = reply["content"]
        if content["status"] != "ok":
            raise RuntimeError(f"{content.get('ename')}: {content.get('evalue')}")

    async def messages(self, code):
        """The messages of one cell, until it has ended."""
        request = self.client.execute(code, store_history=True, allow_stdin=False)
        while True:
            waiting = asyncio.ensure_future(self.client.get_iopub_msg())
            while not (await asyncio.wait({waiting}, timeout=1))[0]:
                if not await self.manager.is_alive():
                    waiting.cancel()
                    yield {"type": "error", "name": "KernelDied", "value": "the kernel of this context has ended", "traceback": ""}
                    yield {"type": "end_of_execution"}
                    raise Refused(500, "the kernel of this context has ended")
            message = waiting.result()
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                yield {"type": "end_of_execution"}
                return
            translated = translate(kind, content)
            if translated:
                yield translated


def translate(kind, content):
    """A message of a kernel as the clients expect it."""
    if kind == "stream":
        return {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
    if kind in ("display_data", "execute_result"):
        result = {"type": "result", "is_main_result": kind == "execute_result"}
        for mime, value in content["data"].items():
            if isinstance(value, list):
                value = "".join(value)
            name = MIME.get(mime)
            if name:
                result[name] = value
            else:
                result.setdefault("extra", {})[mime] = value
        return result
    if kind == "error":
        trace = "\n".join(content["traceback"])
        return {"type": "error", "name": content["ename"], "value": content["evalue"], "traceback": trace}
    if kind == "execute_input":
        return {"type": "number_of_executions", "execution_count": content["execution_count"]}
    return None


class Interpreter:
    """All contexts."""

    def __init__(self):
        self.contexts = {}
        self.default = None
        self.changed = asyncio.Event()
        self.environment = {}
        self.identity = read_identity()
        self.starting = asyncio.Lock()

    async def create(self, cwd=None, language=None):
        if language not in (None, "", "python", "python3"):
            raise Refused(400, f"language {str(language)[:40]!r} is not supported, only python is")
        cwd = cwd or HOME
        if not isinstance(cwd, str) or not os.path.isdir(cwd):
            raise Refused(400, f"cwd {str(cwd)[:200]!r} is not a directory")
        if len(self.contexts) >= MAX_CONTEXTS:
            raise Refused(429, f"{MAX_CONTEXTS} contexts are open already")
        await self.know()
        context = Context(cwd)
        self.contexts[context.id] = context
        try:
            await context.start(self.identity, self.environment)
        except BaseException:
            self.contexts.pop(context.id, None)
            await context.stop()
            raise
        return context

    async def get(self, id=None, language=None):
        if id is None or id == "default":
            if language not in (None, "", "python", "python3"):
                raise Refused(400, f"language {str(language)[:40]!r} is not supported, only python is")
            async with self.starting:
                default = self.contexts.get(self.default)
                # It may have ended between two cells.
                if default and not await default.manager.is_alive():
                    await self.remove(default)
                if self.default not in self.contexts:
                    self.default = (await self.create()).id
            id = self.default
        context = self.contexts.get(id)
        if context is None:
            raise Refused(404, f"Context {str(id)[:80]} not found")
        return context

    async def restart(self, context):
        async with context.lock:
            await context.stop()
            await self.know()
            await context.start(self.identity, self.environment)

    async def remove(self, context):
        self.contexts.pop(context.id, None)
        await context.stop()

    async def know(self):
        """Learns who this machine is, when it has become another since."""
        now = read_identity()
        if now == self.identity:
            return
        deadline = asyncio.get_running_loop().time() + IDENTITY_LIMIT
        while True:
            self.changed.clear()
            identity, environment = read_environment()
            if identity == now:
                self.identity, self.environment = identity, environment
                return
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self.changed.wait(), max(left, 0))
            except asyncio.TimeoutError:
                # The hook did not come; new randomness is still due.
                self.identity = now
                return

    async def prepare(self, context):
        """Makes a kernel know who its machine is."""
        await self.know()
        if context.identity != self.identity:
            await context.silent(RENEW.replace("{environment}", repr(self.environment)))
            context.identity = self.identity


def read_identity():
    with open(IDENTITY, encoding="ascii") as file:
        return file.read().strip()


def read_environment():
    try:
        with open(ENVIRONMENT, encoding="utf-8", errors="surrogateescape") as file:
            identity, _, rest = file.read().partition("\n")
    except FileNotFoundError:
        return None, {}
    pairs = (pair.partition("=") for pair in rest.split("\0") if "=" in pair)
    # What is the hook's own stays the hook's own.
    return identity, {name: value for name, _, value in pairs if name not in ("PATH", "PWD", "SHLVL", "_", "HOME")}


class Handler(web.RequestHandler):
    """What all routes have in common."""

    def initialize(self, interpreter):
        self.interpreter = interpreter

    def body(self):
        if not self.request.body:
            return {}
        try:
            body = json.loads(self.request.body)
        except ValueError as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        return body

    def write_error(self, status_code, **kwargs):
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, Refused):
            self.set_status(error.status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"code": self.get_status(), "message": str(error) if error else self._reason}))

    def log_exception(self, typ, value, tb):
        if not isinstance(value, (Refused, iostream.StreamClosedError)):
            super().log_exception(typ, value, tb)


class Health(Handler):
    def get(self):
        self.finish("OK")


class Contexts(Handler):
    async def get(self):
        self.finish(json.dumps([context.describe() for context in self.interpreter.contexts.values()]))

    async def post(self):
        body = self.body()
        context = await self.interpreter.create(body.get("cwd"), body.get("language"))
        self.finish(json.dumps(context.describe()))


class One(Handler):
    async def delete(self, id):
        await self.interpreter.remove(await self.interpreter.get(id))
        self.set_status(204)


class Restart(Handler):
    async def post(self, id):
        await self.interpreter.restart(await self.interpreter.get(id))
        self.set_status(204)


class Execute(Handler):
    gone = False
    running = None

    def on_connection_close(self):
        # Nobody reads what it prints any more.
        self.gone = True
        if self.running:
            asyncio.ensure_future(self.running.manager.interrupt_kernel())

    async def post(self):
        body = self.body()
        code = body.get("code")
        if not isinstance(code, str):
            raise Refused(400, "code has to be a text")
        variables = body.get("env_vars") or {}
        if not isinstance(variables, dict) or not all(isinstance(item, str) for pair in variables.items() for item in pair):
            raise Refused(400, "env_vars has to be an object of texts")
        if body.get("context_id") and body.get("language"):
            raise Refused(400, "name a context or a language, not both")
        context = await self.interpreter.get(body.get("context_id"), body.get("language"))
        self.set_header("Content-Type", "application/x-ndjson")
        async with context.lock:
            if self.gone:
                return
            if not await context.manager.is_alive():
                await self.interpreter.remove(context)
                raise Refused(404, f"Context {context.id} not found: its kernel has ended")
            await self.interpreter.prepare(context)
            if variables:
                await context.silent(
                    f"import os; _kelvin_before = {{name: os.environ.get(name) for name in {list(variables)!r}}}; os.environ.update({variables!r})"
                )
            self.running = context
            try:
                async for message in context.messages(code):
                    if not self.gone:
                        self.write(json.dumps(message) + "\n")
                        await self.flush()
            except iostream.StreamClosedError:
                self.on_connection_close()
            except Refused:
                await self.interpreter.remove(context)
                return
            finally:
                self.running = None
            if variables:
                await context.silent(
                    "[os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value) for name, value in _kelvin_before.items()]; del _kelvin_before"
                )


async def serve():
    interpreter = Interpreter()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, interpreter.changed.set)
    context = await interpreter.get()
    await context.silent(WARM_UP)
    with_interpreter = {"interpreter": interpreter}
    application = web.Application(
        [
            ("/health", Health, with_interpreter),
            ("/execute", Execute, with_interpreter),
            ("/contexts", Contexts, with_interpreter),
            ("/contexts/([^/]+)", One, with_interpreter),
            ("/contexts/([^/]+)/restart", Restart, with_interpreter),
        ]
    )
    application.listen(PORT, address="0.0.0.0", max_body_size=MAX_BODY)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    for context in list(interpreter.contexts.values()):
        await interpreter.remove(context)


def wait():
    """Ends when cells are run: the service listens once it has run one of its own."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=60):
                return 0
        except OSError as error:
            # Nothing tells when somebody begins to listen on a port.
            if time.monotonic() > deadline:
                return f"the interpreter does not answer: {error}"
            time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
    elif sys.argv[1:] == ["wait"]:
        sys.exit(wait())
    else:
        sys.exit("usage: code_interpreter.py serve | wait")
