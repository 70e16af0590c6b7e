"""What the template of `kelvin bench build` serves: what its packages say, and what its last step has written."""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import bench_words


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{bench_words.greet()}, {Path('data/last').read_text()}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Answer).serve_forever()
