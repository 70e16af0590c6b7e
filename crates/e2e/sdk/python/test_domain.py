"""By name and over TLS: E2B_DOMAIN is the only setting beside the key; SSL_CERT_FILE has the authority."""

import os
import ssl
import time

import httpx
import pytest
from e2b import Sandbox, SandboxState

SERVER = """
import base64, hashlib, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.headers.get("Upgrade") == "websocket":
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers()
            head = self.rfile.read(2); length = head[1] & 127
            mask = self.rfile.read(4); data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            self.wfile.write(bytes([129, len(data)]) + data[::-1]); self.wfile.flush()
            self.close_connection = True
            return
        body = (" ".join(self.headers) if self.path == "/names" else self.headers["Host"]).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


def serve(sandbox):
    sandbox.files.write("server.py", SERVER)
    handle = sandbox.commands.run("python3 server.py", background=True)
    sandbox.commands.run("until python3 -c 'import socket; socket.create_connection((\"localhost\", 8000))' 2>/dev/null; do sleep 0.1; done")
    return handle


@pytest.fixture
def sandbox():
    sandbox = Sandbox.create("base", timeout=120)
    yield sandbox
    sandbox.kill()


def test_the_sdk_finds_everything_by_name(sandbox):
    assert sandbox.sandbox_domain == os.environ["E2B_DOMAIN"]
    assert sandbox.commands.run("echo by name").stdout == "by name\n"
    sandbox.files.write("f", "content")
    assert httpx.get(sandbox.download_url("f"), verify=context()).text == "content"


def context():
    return ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])


@pytest.mark.parametrize("http2", [False, True])
def test_a_server_is_reached_by_its_host(sandbox, http2):
    serve(sandbox)
    host = sandbox.get_host(8000)
    with httpx.Client(http2=http2, verify=context()) as client:
        reply = client.get(f"https://{host}/")
        assert (reply.status_code, reply.text, reply.http_version) == (200, host, "HTTP/2" if http2 else "HTTP/1.1")
        assert {"Host", "User-Agent", "X-Forwarded-Host"} <= set(client.get(f"https://{host}/names").text.split())
        assert client.get(f"https://{sandbox.get_host(8001)}/").status_code == 502


def test_a_websocket_by_name(sandbox):
    from websockets.sync.client import connect

    serve(sandbox)
    with connect(f"wss://{sandbox.get_host(8000)}/", ssl=context()) as socket:
        socket.send("reverse me")
        assert socket.recv() == "em esrever"


def test_private_ports_ask_for_their_token():
    sandbox = Sandbox.create("base", timeout=120, network={"allow_public_traffic": False})
    try:
        serve(sandbox)
        url = f"https://{sandbox.get_host(8000)}/"
        assert httpx.get(url, verify=context()).status_code == 403
        headers = {"e2b-traffic-access-token": sandbox.traffic_access_token}
        assert httpx.get(url, verify=context(), headers=headers).status_code == 200
    finally:
        sandbox.kill()


def test_the_host_is_masked():
    sandbox = Sandbox.create("base", timeout=120, network={"mask_request_host": "app.local:${PORT}"})
    try:
        serve(sandbox)
        assert httpx.get(f"https://{sandbox.get_host(8000)}/", verify=context()).text == "app.local:8000"
    finally:
        sandbox.kill()


def test_a_visitor_brings_it_back():
    sandbox = Sandbox.create("base", timeout=120, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        serve(sandbox)
        sandbox.set_timeout(1)
        deadline = time.monotonic() + 30
        while sandbox.get_info().state != SandboxState.PAUSED:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.get(f"https://{sandbox.get_host(8000)}/", verify=context(), timeout=30).status_code == 200
        assert sandbox.get_info().state == SandboxState.RUNNING
    finally:
        sandbox.kill()
