"""A local HTTP server that can be slow, fail and truncate."""

import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves a folder under `/MANNER/name`, each manner with a fault of its own."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()  # of each range
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                manner, name = self.path.partition("?")[0].split("/")[1:]
                part = f"{manner}/{name}/{self.headers.get('Range')}"
                server.asked[f"{manner}/{name}"] += 1
                server.parts[part] += 1
                server.answer(self, manner, folder / name, server.parts[part])

            def log_message(self, *_):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, manner: str, name: str = "") -> str:
        return f"http://127.0.0.1:{self.httpd.server_address[1]}/{manner}/{name}"

    def answer(self, ask: BaseHTTPRequestHandler, manner: str, path: Path, time_asked: int) -> None:
        if manner == "busy" and time_asked < 3:
            return ask.send_error(503)
        if manner.startswith("to:"):
            ask.send_response(302)
            ask.send_header("Location", bytes.fromhex(manner[3:]).decode())
            return ask.end_headers()
        if not path.is_file() or manner == "gone":
            return ask.send_error(404)
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
        if asked and manner != "rangeless":
            start = int(asked[1])
            if start >= len(data):
                return ask.send_error(416)
            end = min(int(asked[2] or len(data)), len(data) - 1)
            ask.send_response(206)
            ask.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        else:
            ask.send_response(200)
        ask.send_header("Content-Length", str(len(data)))
        ask.end_headers()
        stop = len(data)
        if (manner == "drops" and time_asked == 1) or manner == "truncated":
            stop //= 2
        if manner == "stuck" and time_asked < 3:
            stop = 100
        if manner == "slow":
            time.sleep(0.2)
        try:
            ask.wfile.write(data[:stop])
            self.sent += stop
            if manner == "stuck" and stop < len(data):
                ask.wfile.flush()
                time.sleep(1.5)
        except OSError:
            pass  # the reader left
