"""Create to the end of the first command, with the official SDK: one line of JSON for each."""

import json
import sys
import time

from e2b import Sandbox

for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    sandbox = Sandbox.create(sys.argv[2], timeout=120)
    created = time.perf_counter()
    result = sandbox.commands.run("echo ready")
    ended = time.perf_counter()
    sandbox.kill()
    if result.stdout != "ready\n":
        sys.exit(f"the command printed {result.stdout!r}")
    print(json.dumps({"create_ms": (created - started) * 1e3, "ready_ms": (ended - started) * 1e3}), flush=True)
