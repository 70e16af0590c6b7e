"""The official Python SDK on Kelvin: pip install e2b; E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY are set."""

from e2b import Sandbox

with Sandbox.create("base", timeout=60, metadata={"example": "python"}) as sandbox:
    sandbox.files.write("hello.py", "print(6 * 7)")
    print(sandbox.commands.run("python3 hello.py").stdout, end="")
    sandbox.pause()
    sandbox.connect()
    print(sandbox.files.read("hello.py"))
