"""Fifty clients at once: create, run, upload and download 10 MiB, kill. Prints how long each part lasted; fails when one
of them fails.

    fifty_clients.py [CLIENTS] [MIB]
"""

import asyncio
import os
import sys
import time

from e2b import AsyncSandbox

CLIENTS = int(sys.argv[1]) if len(sys.argv) > 1 else 50
CONTENT = os.urandom((int(sys.argv[2]) if len(sys.argv) > 2 else 10) << 20)
PARTS = ["create", "run", "upload", "download", "kill"]


async def client(times):
    async def timed(part, work):
        started = time.monotonic()
        result = await work
        times[part].append(time.monotonic() - started)
        return result

    sandbox = await timed("create", AsyncSandbox.create("base", timeout=600, request_timeout=300))
    try:
        result = await timed("run", sandbox.commands.run("echo $((6 * 7))", request_timeout=300))
        assert result.stdout == "42\n", result
        await timed("upload", sandbox.files.write("content", CONTENT, request_timeout=300))
        read = await timed("download", sandbox.files.read("content", format="bytes", request_timeout=300))
        assert bytes(read) == CONTENT, "it came back otherwise"
    finally:
        assert await timed("kill", sandbox.kill(request_timeout=300))


async def main():
    times = {part: [] for part in PARTS}
    started = time.monotonic()
    results = await asyncio.gather(*(client(times) for _ in range(CLIENTS)), return_exceptions=True)
    failed = [result for result in results if result is not None]
    print(f"{CLIENTS} clients, {len(CONTENT) >> 20} MiB each way, {time.monotonic() - started:.1f} s, {len(failed)} failed")
    print(f"{'seconds':10} {'p50':>8} {'p95':>8} {'p99':>8}")
    for part, values in times.items():
        values.sort()
        at = lambda share: values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
        print(f"{part:10} {at(0.5):8.2f} {at(0.95):8.2f} {at(0.99):8.2f}")
    for failure in failed[:5]:
        print(repr(failure)[:500], file=sys.stderr)
    return 1 if failed else 0


status = asyncio.run(main())
sys.stdout.flush()
# Without the interpreter's shutdown: threads of the SDK's HTTP client (pyqwest) that come back to it then abort it.
os._exit(status)
