"""The page that is there from the first second and turns into the app.

It is served to this computer only, and only to the tab the launcher opened: the address carries a
key that every request repeats in a header, which no other page and no other person here knows.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from assets.launcher.report import Report

PAGE_FOLDER = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("../icon/prescope.svg", "image/svg+xml"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STOPS_WITHIN_S = 0.1
KEY_HEADER = "X-PreScope-Key"


class ProgressPage:
    """Serves one report on a free port of 127.0.0.1, between `start` and `stop`."""

    def __init__(self, report: Report) -> None:
        key = secrets.token_urlsafe(24)
        actions: dict[str, Callable[[], None]] = {
            "/retry": report.retry,
            "/agree": lambda: report.answer(True),
            "/decline": lambda: report.answer(False),
        }
        handler = type("Handler", (_Handler,), {"report": report, "key": key, "actions": actions})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._stopped = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/?k={key}"

    def start(self) -> None:
        arguments = (STOPS_WITHIN_S,)
        threading.Thread(target=self._server.serve_forever, args=arguments, daemon=True).start()

    def stop(self) -> None:
        """May be called twice."""
        if not self._stopped:
            self._stopped = True
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    report: ClassVar[Report]
    key: ClassVar[str]
    actions: ClassVar[dict[str, Callable[[], None]]]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._from_this_computer():
            self._send(421, "text/plain", b"wrong host")
        elif path in FILES:
            name, kind = FILES[path]
            self._send(200, kind, (PAGE_FOLDER / name).read_bytes())
        elif path == "/status" and self._has_key():
            self._send(200, "application/json", json.dumps(self.report.snapshot()).encode())
        else:
            self._send(404, "text/plain", b"not here")

    def do_POST(self) -> None:
        action = self.actions.get(self.path)
        if not self._from_this_computer():
            self._send(421, "text/plain", b"wrong host")
        elif action is None or not self._has_key():
            self._send(403, "text/plain", b"not allowed")
        else:
            action()
            self._send(200, "text/plain", b"ok")

    def _from_this_computer(self) -> bool:
        """A foreign name that was made to point here (DNS rebinding) shows in the Host header."""
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        return self.headers.get("Host", "") in (f"127.0.0.1:{port}", f"localhost:{port}")

    def _has_key(self) -> bool:
        return hmac.compare_digest(self.headers.get(KEY_HEADER, "").encode(), self.key.encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """The console is for people."""
