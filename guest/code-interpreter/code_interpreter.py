"""Runs cells: `/execute` and `/contexts` on port 49999, over Jupyter kernels.

    serve   the service
    wait    ends when the service runs cells

A context is one kernel: a process of its own, with the state of its cells (`contexts.py`, `kernels.py`). Output is streamed, a
line of JSON for each message. One cell at a time in each context; a client that goes away interrupts its cell. A crash of the
service loses the kernels' state, and the agent starts it again.
"""

import asyncio
import json
import signal
import sys
import time
import urllib.request

from tornado import iostream, web

import kernels
import languages
from contexts import Cell, Ended, Interpreter, Refused

PORT = 49999
# Bytes of one request.
MAX_BODY = 16 << 20
# What a first plot would load, loaded before the snapshot.
WARM_UP = """
def _kelvin_warm_up():
    import matplotlib.pyplot, numpy, pandas
    shell = get_ipython()
    shell.run_line_magic("matplotlib", "inline")
    figure, axes = matplotlib.pyplot.subplots()
    axes.plot([0, 1])
    shell.display_formatter.format(figure)
    shell.display_formatter.format(pandas.DataFrame({"a": [0]}))
    matplotlib.pyplot.close("all")
_kelvin_warm_up(); del _kelvin_warm_up
"""


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
        await self.interpreter.remove(self.interpreter.find(id))
        self.set_status(204)


class Restart(Handler):
    async def post(self, id):
        await self.interpreter.find(id).restart()
        self.set_status(204)


class Execute(Handler):
    cell = None
    context = None

    def on_connection_close(self):
        # Nobody reads what it prints any more.
        if self.cell and not self.cell.gone:
            self.context.leave(self.cell)

    async def send(self, message):
        if self.cell.gone:
            return
        try:
            self.write(json.dumps(message) + "\n")
            await self.flush()
        except iostream.StreamClosedError:
            self.on_connection_close()

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
        self.context = self.interpreter.get(body.get("context_id"), body.get("language"))
        wrong = languages.wrong_variable(self.context.language, variables)
        if wrong:
            raise Refused(400, wrong)
        self.set_header("Content-Type", "application/x-ndjson")
        self.cell = Cell(code, variables, self.send)
        try:
            await self.context.execute(self.cell)
        except Ended as ended:
            await self.send(kernels.error_event(ended.name, str(ended)))
        await self.send({"type": "end_of_execution"})


async def serve():
    kernels.sweep()
    interpreter = Interpreter()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, interpreter.machine.changed.set)
    await interpreter.get().warm_up(WARM_UP)
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
    await interpreter.close()


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
