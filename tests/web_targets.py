"""A running page for tests that send it requests, header line by header line."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from app.environment import prepare_environment
from app.server import AppServer
from tests.fake_engine import FakeEngine

EVIL = "http://evil.example"


@dataclass
class Target:
    """A running server and the headers that a signed-in page of its own would send."""

    port: int
    app: FastAPI
    cookie: str = ""
    server: AppServer | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, *lines: str, body: bytes = b"", host: str | None = ""
    ) -> Reply:
        """Send one request with exactly these header lines; `host` None sends no Host."""
        head = [f"{method} {path} HTTP/1.1", "Connection: close"]
        if host is not None:
            head.append(f"Host: {host or self.host}")
        if body or method == "POST":
            head.append(f"Content-Length: {len(body)}")
        head += lines
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as link:
            link.sendall("\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + body)
            return read_reply(link)

    def ask_signed_in(self, method: str, path: str, *lines: str, **given: Any) -> Reply:
        return self.ask(method, path, *([self.cookie] if self.cookie else []), *lines, **given)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    start: bytes


def read_reply(link: socket.socket) -> Reply:
    raw = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in raw and (more := link.recv(65536)):
            raw += more
    head, _, start = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    headers = {name.lower(): value for name, _, value in pairs}
    length = int(headers.get("content-length", "0"))
    with contextlib.suppress(ConnectionError):
        while len(start) < min(length, 65536) and (more := link.recv(65536)):
            start += more
    return Reply(int(status.split()[1]) if status else 0, headers, start)


@contextlib.contextmanager
def quiet_environment(folder: Path) -> Iterator[None]:
    """Gradio as the app would have it, and afterwards the environment as it was."""
    before = dict(os.environ)
    prepare_environment(folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def our_page(folder: Path) -> Iterator[Target]:
    """The real page over the fake engine, and somebody who is signed in."""
    server = AppServer(folder, 0, lambda _: FakeEngine(load_s=0.05))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        target = Target(server.port, server.app, server=server)
        reply = target.ask("GET", f"/?t={server.token}")
        target.cookie = "Cookie: " + reply.headers["set-cookie"].split(";")[0]
        yield target
    finally:
        server.leave()
        thread.join()
        server.close()
