"""A package index on this computer: tiny wheels, honest ranges, and every kind of bad day."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import io
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK_BYTES = 16_384


def metadata(project: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"


def make_wheel(project: str, version: str, modules: dict[str, str], padding: int = 0) -> bytes:
    """A valid wheel with these modules and `padding` bytes that do not compress."""
    info = f"{project}-{version}.dist-info"
    files = {name: text.encode() for name, text in modules.items()}
    if padding:
        files[f"{project}_padding.bin"] = noise(padding)
    files[f"{info}/METADATA"] = metadata(project, version).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_record_hash(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return packed.getvalue()


def borrowed_pip() -> tuple[str, bytes]:
    """The name and the bytes of a wheel that lends out this environment's own pip: a real one has
    600 files, and unpacking those in every test says nothing about the launcher."""
    version = importlib.metadata.version("pip")
    real = Path(str(importlib.metadata.distribution("pip").locate_file("pip")))
    lender = (real / "__init__.py").read_text("utf-8") + f"\n__path__[:] = [{str(real)!r}]\n"
    wheel = make_wheel("pip", version, {"pip/__init__.py": lender})
    return f"pip-{version}-py3-none-any.whl", wheel


def noise(size: int, seed: bytes = b"seed") -> bytes:
    """The same bytes for the same seed, and no two places alike."""
    blocks = [hashlib.sha256(seed + str(i).encode()).digest() for i in range(size // 32 + 1)]
    return b"".join(blocks)[:size]


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


class Index:
    """Serves `files` at /files/ and an index of them at /simple/. Settings may change at any time.

    `cut_after` closes the next connection after so many bytes, once. `stall_after` keeps the next
    one open and silent. `block_pause_s` slows everything but pip itself down. `sent[name]` counts
    body bytes.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.lies: dict[str, str] = {}
        self.sent: dict[str, int] = {}
        self.ranges: list[str | None] = []
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.block_pause_s = 0.0
        self.ignore_ranges = False
        self.status: int | None = None
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"index": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self.simple = f"{self.origin}/simple"

    def add(self, name: str, data: bytes) -> str:
        """The file's sha256."""
        self.files[name] = data
        return hashlib.sha256(data).hexdigest()

    def url(self, name: str) -> str:
        return f"{self.origin}/files/{name}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    index: Index

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        kind, name = self.path.strip("/").split("/", 1)
        name = name.rstrip("/").replace("%2B", "+")
        if self.index.status is not None:
            self._send(self.index.status, b"", {})
        elif kind == "simple":
            self._send(200, self._listing(name), {"Content-Type": "text/html"})
        elif name.endswith(".metadata") and name.removesuffix(".metadata") in self.index.files:
            project, version = name.split("-")[:2]
            self._send(200, metadata(project, version).encode(), {})
        elif name in self.index.files:
            self._send_file(name, with_body)
        else:
            self._send(404, b"", {})

    def _listing(self, project: str) -> bytes:
        links = []
        for name, data in self.index.files.items():
            if name.split("-")[0].replace("_", "-").lower() == project:
                digest = self.index.lies.get(name) or hashlib.sha256(data).hexdigest()
                href = html.escape(f"/files/{name}#sha256={digest}")
                links.append(f'<a href="{href}" data-core-metadata="true">{name}</a>')
        return "<br>".join(links).encode()

    def _send_file(self, name: str, with_body: bool) -> None:
        data = self.index.files[name]
        tag = self.index.tags.get(name, f'"{hashlib.sha256(data).hexdigest()[:8]}"')
        headers = {"ETag": tag, "Content-Length": str(len(data))}
        asked = self.headers.get("Range")
        if not with_body:
            self._send(200, b"", headers)
            return
        self.index.ranges.append(asked)
        status, body = 200, data
        same_file = self.headers.get("If-Range") in (None, tag)
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        if match and same_file and not self.index.ignore_ranges:
            start = int(match[1])
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, data[start:]
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            headers["Content-Length"] = str(len(body))
        self._send_slowly(name, status, body, headers)

    def _send_slowly(self, name: str, status: int, body: bytes, headers: dict[str, str]) -> None:
        cut, self.index.cut_after = self.index.cut_after, None
        stall, self.index.stall_after = self.index.stall_after, None
        self._send(status, b"", headers)
        for at in range(0, len(body), BLOCK_BYTES):
            if cut is not None and at >= cut:
                self.close_connection = True
                return
            if stall is not None and at >= stall:
                self.index.closing.wait(5)
                return
            block = body[at : at + BLOCK_BYTES]
            try:
                self.wfile.write(block)
            except OSError:
                return
            self.index.sent[name] = self.index.sent.get(name, 0) + len(block)
            if self.index.block_pause_s and not name.startswith("pip-"):
                time.sleep(self.index.block_pause_s)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests look at counts, not at logs."""
