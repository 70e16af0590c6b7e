"""Contexts: what clients run cells in.

    context   id, language, directory; from its creation until it is removed
      epoch   the context between two restarts: one kernel at a time, one cell at a time, the others in a queue
        cell  waits for its turn -> runs -> has ended

A restart and a removal wait for no cell. They end the epoch: its cells, running and queued, are told why at once, and the
kernel is interrupted, given `kernels.GRACE`, and killed. A kernel that ends otherwise is replaced for the next cell of the
epoch, whose client is told on its standard error output unless the client of the cell that ran then was told already.
"""

import asyncio
import os
import uuid

import languages
from kernels import Died, Kernel, error_event, specs, stream_event

HOME = "/home/user"
IDENTITY = "/proc/sys/kernel/random/boot_id"
ENVIRONMENT = "/run/kelvin/code-interpreter.env"
FORMATS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "result_formats.py")
# Kernels at one time; each takes about 60 MiB.
MAX_CONTEXTS = 32
# Cells that may wait in a context.
MAX_QUEUED = 64
# Seconds that the new environment may be on its way after a restore.
IDENTITY_LIMIT = 5
# Seconds after each of two interrupts in which a cell that nobody waits for may end, before its kernel is ended for others.
ABANDONED_LIMIT = 5
LOST = "variables are gone, files are kept"


class Refused(Exception):
    """What the caller is told, with a status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Ended(Exception):
    """Why a cell does not run any more: the context was restarted or removed."""

    def __init__(self, name, text):
        super().__init__(text)
        self.name = name


class Cell:
    """One request to run code."""

    def __init__(self, code, variables, send):
        self.code = code
        self.variables = variables
        self.send = send
        self.gone = False
        self.has_turn = False
        self.task = None
        self.kernel = None


class Epoch:
    """A context between two restarts."""

    def __init__(self):
        self.turn = asyncio.Lock()
        self.tasks = set()
        self.queued = 0
        self.wanted = asyncio.Event()
        self.kernel = None
        # What the next cell is told before it runs.
        self.notice = None
        self.reason = None

    async def run(self, work):
        """Runs `work(self)` when it is its turn. `Ended` as soon as the epoch is."""
        if self.reason:
            raise self.reason
        task = asyncio.ensure_future(self._in_turn(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if task.cancelled() and self.reason:
            raise self.reason
        return task.result()

    async def _in_turn(self, work):
        self.queued += 1
        if self.turn.locked():
            self.wanted.set()
        try:
            await self.turn.acquire()
        finally:
            self.queued -= 1
            if not self.queued:
                self.wanted.clear()
        try:
            return await work(self)
        finally:
            self.turn.release()

    def end(self, reason):
        """Tells all cells why they run no more. The first reason holds."""
        if self.reason is None:
            self.reason = reason
            for task in self.tasks:
                task.cancel()

    async def close(self):
        """Ends the kernel; after `end`."""
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.kernel:
            await self.kernel.stop()


class Context:
    """What cells of one language share."""

    def __init__(self, machine, kernel_name, language, cwd):
        self.id = str(uuid.uuid4())
        self.machine = machine
        self.kernel_name = kernel_name
        self.language = language
        self.cwd = cwd
        self.removed = False
        self.epoch = Epoch()
        self.renewal = None
        self.background = set()

    def describe(self):
        # How many wait is ours; E2B's clients ignore it.
        return {"id": self.id, "language": self.language, "cwd": self.cwd, "queued": self.epoch.queued}

    async def start(self):
        """Starts the kernel, when there is none."""
        try:
            await self.epoch.run(self._ensure_kernel)
        except Died as error:
            raise Refused(500, str(error)) from error
        except Ended as ended:
            raise Refused(409, f"Context {self.id}: {ended}") from ended

    async def warm_up(self, code):
        """Runs `code` of ours once the kernel has started."""

        async def run(epoch):
            await self._ensure_kernel(epoch)
            await epoch.kernel.silent(code)

        await self.epoch.run(run)

    async def restart(self):
        """Ends what runs and what waits, and starts anew. Restarts at the same time are one."""
        if self.removed:
            raise Refused(404, f"Context {self.id} not found")
        if self.renewal is None or self.renewal.done():
            old, self.epoch = self.epoch, Epoch()
            old.end(Ended("ContextRestarted", f"the context was restarted before this cell had ended: {LOST}"))
            self.renewal = self._keep(self._renew(self._keep(old.close())))
        await asyncio.shield(self.renewal)

    async def _renew(self, closed):
        # Two kernels at one time may be more than memory has.
        await asyncio.wait({closed})
        await self.start()

    async def remove(self):
        """Ends everything. The caller has taken the context off its list."""
        self.removed = True
        self.epoch.end(Ended("ContextRemoved", "the context was removed before this cell had ended"))
        self._keep(self.epoch.close())
        await asyncio.gather(*self.background, return_exceptions=True)

    def _keep(self, work):
        """A task that goes on when its caller goes away."""
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        # Whoever waits for it is told as well.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _ensure_kernel(self, epoch):
        if epoch.kernel and not epoch.kernel.works:
            if epoch.kernel.died.done() and not epoch.notice:
                epoch.notice = await epoch.kernel.why()
            await epoch.kernel.stop()
            epoch.kernel = None
        if epoch.kernel is None:
            await self.machine.learn()
            epoch.kernel = kernel = Kernel(self.kernel_name, self.language, self.cwd)
            try:
                await kernel.start(self.machine.environment)
                if self.language == "python":
                    await kernel.silent(f"exec(compile(open({FORMATS!r}).read(), {FORMATS!r}, 'exec'), {{}})")
            except Died:
                await kernel.stop()
                raise
            kernel.identity, kernel.prepared = self.machine.identity, True

    async def execute(self, cell):
        """Runs `cell` when it is its turn. `Ended` when it is restarted or removed before the cell has ended."""
        epoch = self.epoch
        if epoch.queued >= MAX_QUEUED:
            raise Refused(429, f"{MAX_QUEUED} cells wait in this context already")
        cell.task = asyncio.ensure_future(epoch.run(lambda epoch: self._cell(epoch, cell)))
        try:
            await cell.task
        except asyncio.CancelledError:
            if not cell.gone:
                raise

    def leave(self, cell):
        """The client of `cell` has gone: a cell that waits is dropped, one that runs is interrupted."""
        cell.gone = True
        if cell.task and not cell.has_turn:
            cell.task.cancel()
        elif cell.kernel:
            self._keep(self._abandon(self.epoch, cell))

    async def _abandon(self, epoch, cell):
        kernel = cell.kernel
        # One may come before the cell has begun.
        for _ in range(2):
            await kernel.interrupt()
            await asyncio.wait({cell.task}, timeout=ABANDONED_LIMIT)
            if cell.task.done():
                return
        # It may be in the middle of something long, with a state that is worth waiting for: until somebody else waits.
        wanted = asyncio.ensure_future(epoch.wanted.wait())
        await asyncio.wait({cell.task, wanted}, return_when=asyncio.FIRST_COMPLETED)
        wanted.cancel()
        if not cell.task.done():
            kernel.kill(f"a cell whose client had gone did not end when it was interrupted, and its kernel was ended after {2 * ABANDONED_LIMIT} s")

    async def _cell(self, epoch, cell):
        cell.has_turn = True
        try:
            await self._ensure_kernel(epoch)
            kernel = epoch.kernel
            await self.machine.prepare(kernel)
            if cell.variables:
                await kernel.silent(languages.set_for_a_cell(self.language, cell.variables))
            if epoch.notice and not cell.gone:
                await cell.send(stream_event("stderr", f"kelvin: {epoch.notice}; {LOST}\n"))
                epoch.notice = None
            if not cell.gone:
                cell.kernel = kernel
                async for message in kernel.messages(cell.code):
                    await cell.send(message)
                cell.kernel = None
            if cell.variables:
                await kernel.silent(languages.set_back(self.language, cell.variables))
        except Died as died:
            cell.kernel = None
            if epoch.kernel:
                await epoch.kernel.stop()
                epoch.kernel = None
            if cell.gone or epoch.queued:
                epoch.notice = str(died)
            await cell.send(error_event("KernelDied", f"{died}; {LOST}, the next cell runs in a fresh kernel"))


class Machine:
    """Who this machine is: another one after each restore."""

    def __init__(self):
        self.identity = read_identity()
        self.environment = {}
        self.changed = asyncio.Event()

    async def learn(self):
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

    async def prepare(self, kernel):
        """Makes a kernel know who its machine is."""
        await self.learn()
        if kernel.identity == self.identity:
            return
        for code in (languages.set_for_good(kernel.language, self.environment), languages.reseed(kernel.language)):
            if code:
                await kernel.silent(code)
        kernel.identity = self.identity


class Interpreter:
    """All contexts."""

    def __init__(self):
        self.machine = Machine()
        self.contexts = {}
        # The context of each language that is meant when none is named.
        self.defaults = {}

    def add(self, cwd=None, language=None):
        """A context without a kernel yet."""
        if not isinstance(language, (str, type(None))) or not isinstance(cwd, (str, type(None))):
            raise Refused(400, "language and cwd have to be texts")
        language = languages.normalize(language)
        kernels = languages.installed(specs())
        if language not in kernels:
            raise Refused(400, f"language {language[:40]!r} is not supported here; there are: {', '.join(kernels)}")
        cwd = cwd or HOME
        # As NUL is a character of JSON.
        if "\0" in cwd or not os.path.isdir(cwd) or not os.access(cwd, os.X_OK):
            raise Refused(400, f"cwd {cwd[:200]!r} is not a directory that this user may enter")
        if len(self.contexts) >= MAX_CONTEXTS:
            raise Refused(429, f"{MAX_CONTEXTS} contexts are open already")
        context = Context(self.machine, kernels[language], language, cwd)
        self.contexts[context.id] = context
        return context

    async def create(self, cwd=None, language=None):
        """A context whose kernel runs."""
        context = self.add(cwd, language)
        try:
            await context.start()
        except BaseException:
            await self.remove(context)
            raise
        return context

    def find(self, id):
        """The context `id`."""
        if not isinstance(id, str):
            raise Refused(400, "context_id has to be a text")
        if id == "default":
            id = self.defaults.get("python")
        context = self.contexts.get(id)
        if context is None:
            raise Refused(404, f"Context {str(id or 'default')[:80]} not found")
        return context

    def get(self, id=None, language=None):
        """The context that a cell names; that of its language when it names none, which starts with its first cell."""
        if id is not None and id != "default":
            return self.find(id)
        if not isinstance(language, (str, type(None))):
            raise Refused(400, "language has to be a text")
        name = languages.normalize(language)
        if self.defaults.get(name) not in self.contexts:
            self.defaults[name] = self.add(language=name).id
        return self.contexts[self.defaults[name]]

    async def remove(self, context):
        """Removes a context: from now on it is not found."""
        self.contexts.pop(context.id, None)
        await context.remove()

    async def close(self):
        """Removes all contexts."""
        await asyncio.gather(*(self.remove(context) for context in list(self.contexts.values())))


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
