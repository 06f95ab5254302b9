"""The attacks of the threat model, against the real mounted page, and against stock Gradio.

Each attack is a function that reports whether it got through. All carry a valid cookie where one
exists, so that no control hides behind another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from app import security
from app.environment import prepare_environment
from app.server import AppServer, bind_loopback
from tests.fake_engine import FakeEngine

EVIL = "http://evil.example"
MULTIPART = "multipart/form-data; boundary=B"
UPLOAD = (
    b"--B\r\nContent-Disposition: form-data; name=files; filename=a.txt\r\n\r\nowned\r\n--B--\r\n"
)


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
            return _reply(link)

    def ask_signed_in(self, method: str, path: str, *lines: str, **given: Any) -> Reply:
        return self.ask(method, path, *([self.cookie] if self.cookie else []), *lines, **given)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    start: bytes


def _reply(link: socket.socket) -> Reply:
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


@pytest.fixture(scope="module")
def quiet_gradio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("data")
    prepare_environment(folder)
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def ours(quiet_gradio: Path) -> Iterator[Target]:
    server = AppServer(quiet_gradio, 0, lambda _: FakeEngine(load_s=0.05))
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


@pytest.fixture(scope="module")
def stock(quiet_gradio: Path) -> Iterator[Target]:
    """What a Gradio app gets without us: a private chat function, an upload, defaults."""
    import gradio as gr

    async def mounted() -> FastAPI:
        with gr.Blocks(analytics_enabled=False) as blocks:
            box = gr.Textbox()
            box.submit(lambda text: f"private answer to {text}", box, box, api_name="chat")
            gr.File()
        app = FastAPI()
        gr.mount_gradio_app(app, blocks, path="/", server_name="127.0.0.1")
        return app

    app = asyncio.run(mounted())
    bound = bind_loopback(0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield Target(bound.getsockname()[1], app)
    server.should_exit = True
    thread.join()
    bound.close()


def rebound_name_reads_the_app(target: Target) -> bool:
    """A page at evil.example, rebound to 127.0.0.1, reads our answer as its own."""
    host = f"evil.example:{target.port}"
    origin = f"Origin: http://{host}"
    reply = target.ask_signed_in("GET", "/config", origin, host=host)
    return reply.status == 200 and b"components" in reply.start


def rebound_name_calls_a_function(target: Target) -> bool:
    host = f"evil.example:{target.port}"
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/call/chat",
        f"Origin: http://{host}",
        "Content-Type: application/json",
        host=host,
        body=b'{"data": ["hello"]}',
    )
    return reply.status == 200 and b"event_id" in reply.start


def foreign_page_uploads_a_file(target: Target) -> bool:
    """A form post needs no permission of the browser; the file lands on the disk."""
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/upload",
        f"Origin: {EVIL}",
        "Sec-Fetch-Site: cross-site",
        f"Content-Type: {MULTIPART}",
        body=UPLOAD,
    )
    return reply.status == 200


def page_without_origin_uploads_a_file(target: Target) -> bool:
    reply = target.ask_signed_in(
        "POST", "/gradio_api/upload", f"Content-Type: {MULTIPART}", body=UPLOAD
    )
    return reply.status == 200


def sandboxed_frame_uploads_a_file(target: Target) -> bool:
    reply = target.ask_signed_in(
        "POST",
        "/gradio_api/upload",
        "Origin: null",
        f"Content-Type: {MULTIPART}",
        body=UPLOAD,
    )
    return reply.status == 200


def foreign_page_is_framed(target: Target) -> bool:
    reply = target.ask_signed_in("GET", "/")
    policy = reply.headers.get("content-security-policy", "")
    return "frame-ancestors 'none'" not in policy


def stranger_opens_the_page(target: Target) -> bool:
    """Another program or person on this computer guesses the port."""
    return target.ask("GET", "/").status == 200


def page_loads_from_anywhere(target: Target) -> bool:
    """An image in a model's answer would carry the chat away in its address."""
    policy = target.ask_signed_in("GET", "/").headers.get("content-security-policy", "")
    return "img-src 'self' data: blob:" not in policy


ON_STOCK = [
    rebound_name_reads_the_app,
    rebound_name_calls_a_function,
    foreign_page_uploads_a_file,
    page_without_origin_uploads_a_file,
    sandboxed_frame_uploads_a_file,
    foreign_page_is_framed,
    stranger_opens_the_page,
    page_loads_from_anywhere,
]
Attack = Callable[[Target], bool]


@pytest.mark.parametrize("attack", ON_STOCK)
def test_the_attack_works_on_stock_gradio(stock: Target, attack: Attack) -> None:
    assert attack(stock)


@pytest.mark.parametrize("attack", ON_STOCK)
def test_the_attack_fails_on_prescope(ours: Target, attack: Attack) -> None:
    assert not attack(ours)


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:PORT",
    "localhost",
    "127.0.0.1",
    "[::1]",
    "localhost:1",
    "127.0.0.1:1",
    "localhost:PORT.",
    "localhost.:PORT",
    "localhost.evil.example:PORT",
    "127.0.0.1.evil.example:PORT",
    "evil-localhost:PORT",
    "LOCALHOST:PORT",
    "Localhost:PORT",
    "localhost:0PORT",
    "localhost:PORT0",
    "localhost:+PORT",
    "localhost: PORT",
    "localhost :PORT",
    "localhost:PORT, evil.example",
    "evil.example, localhost:PORT",
    "user@localhost:PORT",
    "localhost:PORT@evil.example",
    "http://localhost:PORT",
    "localhost:PORT/",
    "localhost:PORT#",
    "localhost:PORT?x",
    "127.1:PORT",
    "127.0.0.2:PORT",
    "2130706433:PORT",
    "0x7f000001:PORT",
    "0177.0.0.1:PORT",
    "0.0.0.0:PORT",
    "0:PORT",
    "[::]:PORT",
    "[::ffff:127.0.0.1]:PORT",
    "[0:0:0:0:0:0:0:1]:PORT",
    "::1:PORT",
    "[::1%25lo]:PORT",
    "lоcalhost:PORT",
    "192.168.0.10:PORT",
    "prescope.local:PORT",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", ["/", "/healthz", "/live"])
def test_any_other_name_is_refused(ours: Target, host: str, path: str) -> None:
    reply = ours.ask_signed_in("GET", path, host=host.replace("PORT", str(ours.port)))
    assert reply.status in (400, 421)


@pytest.mark.parametrize("lines", [[], ["Host: localhost:PORT", "Host: localhost:PORT"]])
def test_no_name_and_two_names_are_refused(ours: Target, lines: list[str]) -> None:
    given = [line.replace("PORT", str(ours.port)) for line in lines]
    assert ours.ask_signed_in("GET", "/", *given, host=None).status in (400, 421)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_our_three_names_are_served(ours: Target, host: str) -> None:
    assert ours.ask_signed_in("GET", "/", host=f"{host}:{ours.port}").status == 200


@pytest.mark.parametrize(
    "origin",
    [
        EVIL,
        "null",
        "",
        "http://localhost",
        "https://127.0.0.1:PORT",
        "http://127.0.0.1:1",
        "http://127.0.0.1:PORT.evil.example",
        "http://127.0.0.1:PORT/",
        "file://",
        "chrome-extension://abc",
    ],
)
def test_any_other_origin_is_refused(ours: Target, origin: str) -> None:
    line = "Origin: " + origin.replace("PORT", str(ours.port))
    for method in ("GET", "POST", "OPTIONS"):
        assert ours.ask_signed_in(method, "/gradio_api/queue/join", line).status == 403
    assert ours.ask_signed_in("GET", "/", line, f"Origin: http://{ours.host}").status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "odd"])
def test_requests_of_other_sites_are_refused_but_a_visit_is_not(ours: Target, site: str) -> None:
    line = f"Sec-Fetch-Site: {site}"
    assert ours.ask_signed_in("GET", "/config", line).status == 403
    assert ours.ask_signed_in("GET", "/", line, "Sec-Fetch-Mode: no-cors").status == 403
    visit = ours.ask("GET", "/", line, "Sec-Fetch-Mode: navigate")
    assert visit.status == 401


SHUT = [
    "/gradio_api/file=http://169.254.169.254/latest",
    "/gradio_api/file=https://example.com/",
    "/gradio_api/file=HTTP://example.com/",
    "/gradio_api/file=%68ttp://example.com/",
    "/gradio_api/file=http%3A%2F%2Fexample.com",
    "/gradio_api/file=//host/share",
    "/gradio_api/file=ftp://example.com/",
    "/file=http://example.com/",
    "/gradio_api/proxy=https://example.com/",
    "/gradio_api/upload",
    "/gradio_api/upload_progress?upload_id=1",
    "/gradio_api/deep_link",
    "/monitoring",
    "/monitoring/summary",
]


@pytest.mark.parametrize("path", SHUT)
def test_what_the_page_does_not_need_is_shut_even_to_it(ours: Target, path: str) -> None:
    assert ours.ask_signed_in("GET", path).status == 403
    posted = ours.ask_signed_in("POST", path, f"Origin: http://{ours.host}")
    assert posted.status in (403, 405)


def test_server_functions_cannot_be_called_as_plain_text(ours: Target) -> None:
    reply = ours.ask_signed_in(
        "POST",
        "/gradio_api/component_server",
        f"Origin: http://{ours.host}",
        "Content-Type: text/plain",
        body=b'{"component_id": 1, "fn_name": "x", "data": [], "session_hash": "s"}',
    )
    assert reply.status == 403


@pytest.mark.parametrize(
    "path",
    ["chats/history.sqlite3", "settings.json", "run/app.json", "logs/app.log", "/etc/passwd"],
)
def test_the_file_route_hands_out_none_of_our_files(ours: Target, path: str) -> None:
    assert ours.server is not None
    full = ours.server.data_dir / path
    for address in (f"/gradio_api/file={full}", f"/gradio_api/file=tmp/../{path}"):
        assert ours.ask_signed_in("GET", address).status in (403, 404)


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Return every (method, path) that this server answers, found in its own route list."""
    found: list[tuple[str, str]] = []

    def walk(routes: list[Any], prefix: str) -> None:
        for route in routes:
            inner: Any = getattr(route, "original_router", None) or getattr(route, "app", None)
            if hasattr(inner, "routes"):
                walk(inner.routes, prefix + getattr(route, "path", ""))
            else:
                path = prefix + route.path
                found.extend((method, path) for method in route.methods or ["GET"])

    walk(list(app.routes), "")
    return sorted(set(found))


def filled(path: str) -> str:
    parts = [
        "x" if part.startswith("{") else part.replace("{", "").replace("}", "").replace(":", "")
        for part in path.split("/")
    ]
    return "/".join(parts)


def test_every_route_is_behind_the_guard(ours: Target) -> None:
    """The list comes from the app itself, so that a new route cannot be forgotten."""
    routes = routes_of(ours.app)
    assert {("GET", "/live"), ("GET", "/healthz"), ("POST", "/gradio_api/queue/join")} <= set(
        routes
    )
    assert len(routes) > 40
    wrong: list[tuple[Any, ...]] = []
    for method, path in routes:
        address = filled(path)
        for what, lines, host, allowed in (
            ("rebound", [ours.cookie], "evil.example", {421}),
            ("foreign", [ours.cookie, f"Origin: {EVIL}"], "", {403}),
            ("null", [ours.cookie, "Origin: null"], "", {403}),
            ("cross", [ours.cookie, "Sec-Fetch-Site: cross-site"], "", {403}),
            ("stranger", [f"Origin: http://{ours.host}"], "", {401, 403}),
            (
                "wrong cookie",
                [f"Cookie: prescope_{ours.port}=x", f"Origin: http://{ours.host}"],
                "",
                {401, 403},
            ),
        ):
            if path == "/healthz" and allowed == {401, 403}:
                continue
            reply = ours.ask(method, address, *lines, host=host)
            if reply.status not in allowed:
                wrong.append((what, method, address, reply.status))
        if method not in ("GET", "HEAD"):
            reply = ours.ask(method, address, ours.cookie)
            if reply.status != 403:
                wrong.append(("no origin", method, address, reply.status))
    assert wrong == []


def test_every_answer_carries_the_headers(ours: Target) -> None:
    missing: list[tuple[str, str]] = []
    for method, path in routes_of(ours.app):
        if method == "GET":
            reply = ours.ask_signed_in(method, filled(path), f"Origin: http://{ours.host}")
            for name, value in security.HEADERS.items():
                if reply.headers.get(name.decode()) != value.decode():
                    missing.append((path, name.decode()))
            missing += [(path, name) for name in reply.headers if name.startswith("access-")]
            if "server" in reply.headers:
                missing.append((path, "server"))
    assert missing == []


def test_the_launch_link_is_exchanged_for_a_cookie_of_another_value(ours: Target) -> None:
    assert ours.server is not None
    reply = ours.ask("GET", f"/?t={ours.server.token}")
    assert (reply.status, reply.headers["location"]) == (303, "/")
    assert reply.headers["cache-control"] == "no-store"
    name, *flags = reply.headers["set-cookie"].split("; ")
    assert name.startswith(f"prescope_{ours.port}=")
    assert ours.server.token not in name
    assert set(flags) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    page = ours.ask("GET", "/", f"Cookie: other=1; {name}")
    assert page.status == 200
    assert ours.server.token.encode() not in page.start


@pytest.mark.parametrize(
    "path", ["/?t=", "/?t=wrong", "/?t=%C3%A9", "/config?t=TOKEN", "/?t=TOKEN&t=TOKEN", "/?T=TOKEN"]
)
def test_other_links_let_nobody_in(ours: Target, path: str) -> None:
    assert ours.server is not None
    reply = ours.ask("GET", path.replace("TOKEN", ours.server.token))
    assert reply.status == 401
    assert "set-cookie" not in reply.headers


def test_the_locked_page_explains_itself_and_leaks_nothing(ours: Target) -> None:
    assert ours.server is not None
    reply = ours.ask("GET", "/")
    assert reply.status == 401
    assert b"Double-click PreScope" in reply.start
    assert ours.server.token.encode() not in reply.start
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["content-security-policy"] == security.CONTENT_POLICY


def test_a_program_may_use_the_token_as_a_key(ours: Target) -> None:
    assert ours.server is not None
    key = f"Authorization: Bearer {ours.server.token}"
    assert ours.ask("GET", "/config", key).status == 200
    assert ours.ask("GET", "/config", key[:-1]).status == 401
    assert ours.ask("GET", "/config", key, key).status == 401
    assert ours.ask("GET", "/config", "Authorization: Bearer é").status == 401


def test_health_is_open_and_says_who_answers(ours: Target) -> None:
    reply = ours.ask("GET", "/healthz")
    assert reply.status == 200
    assert reply.start == f'{{"ok":true,"app":"prescope","pid":{os.getpid()}}}'.encode()


def test_bodies_are_capped(ours: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = f"Origin: http://{ours.host}"
    path = "/gradio_api/queue/join"
    monkeypatch.setattr(security, "MAX_BODY_BYTES", 1000)
    assert ours.ask_signed_in("POST", path, origin, body=b"x" * 1001).status == 413
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: {ours.host}\r\n{ours.cookie}\r\n{origin}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", ours.port), timeout=20) as link:
        link.sendall(head.encode() + chunk * 3 + b"0\r\n\r\n")
        assert _reply(link).status != 200


def through_the_guard(headers: list[tuple[bytes, bytes]], bodies: list[bytes]) -> list[Any]:
    """Speak to the guard itself, as a more lenient server would; return what it sent."""
    sent: list[Any] = []
    waiting = list(bodies)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read = 0
        while (message := await receive())["type"] == "http.request":
            read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "read", "body": read})

    guard = security.Guard(app, port=80, token="secret")
    scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b""}
    asyncio.run(guard({**scope, "headers": headers}, receive, send))
    return sent


KEY = (b"authorization", b"Bearer secret")
HOST = (b"host", b"localhost:80")


@pytest.mark.parametrize("headers", [[KEY], [KEY, HOST, HOST], [KEY, HOST, (b"host", b"evil")]])
def test_the_guard_itself_wants_exactly_one_name(headers: list[tuple[bytes, bytes]]) -> None:
    assert through_the_guard(headers, [b""])[0]["status"] == 421


def test_the_guard_itself_hangs_up_on_a_body_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MAX_BODY_BYTES", 1000)
    assert through_the_guard([KEY, HOST], [b"x" * 500] * 2)[1]["body"] == 1000
    assert through_the_guard([KEY, HOST], [b"x" * 500] * 9)[1]["body"] == 1000


lines = st.lists(
    st.tuples(
        st.sampled_from(
            (b"host", b"origin", b"cookie", b"authorization", b"sec-fetch-site", b"content-length")
        ),
        st.sampled_from(
            (
                b"localhost:80",
                b"http://localhost:80",
                b"Bearer secret",
                b"prescope_80=x; prescope_80",
                b"same-origin",
                b"cross-site",
                b"7",
                b"-1",
                b"",
            )
        )
        | st.binary(max_size=12),
    ),
    max_size=6,
)


@given(
    headers=lines,
    method=st.sampled_from(("GET", "POST", "HEAD", "PUT", "TRACE")),
    path=st.sampled_from(("/", "/x", "/gradio_api/file=http://e", "/file=C:/x", "/healthz")),
    query=st.binary(max_size=8) | st.just(b"t=secret"),
)
def test_any_headers_are_refused_unless_all_is_right(
    headers: list[tuple[bytes, bytes]], method: str, path: str, query: bytes
) -> None:
    passed: list[bool] = []
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(True)

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    guard = security.Guard(app, port=80, token="secret")
    scope = {"type": "http", "method": method, "path": path, "query_string": query}
    asyncio.run(guard({**scope, "headers": headers}, receive, send))
    named = [value for name, value in headers if name == b"host"] == [b"localhost:80"]
    keyed = [value for name, value in headers if name == b"authorization"] == [b"Bearer secret"]
    foreign = any(
        value not in (b"http://localhost:80", b"http://[::1]:80", b"http://127.0.0.1:80")
        for name, value in headers
        if name == b"origin"
    )
    if passed:
        assert named
        assert not foreign
        assert keyed or path == "/healthz"
        assert method != "TRACE"
    else:
        assert statuses[0] in (303, 401, 403, 405, 413, 421)
    if statuses[:1] == [303]:
        assert (query, path, method) == (b"t=secret", "/", "GET")


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW"])
def test_odd_methods_are_refused(ours: Target, method: str) -> None:
    assert ours.ask_signed_in(method, "/").status in (400, 404, 405)


def test_web_sockets_are_refused(ours: Target) -> None:
    reply = ours.ask_signed_in(
        "GET",
        "/gradio_api/queue/join",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )
    assert reply.status in (400, 403, 404, 405, 426)
