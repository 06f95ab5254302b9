"""The real mounted page: what its guard refuses, on every route there is, and what it lets in."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from app import security
from tests.web_targets import EVIL, Target, our_page, quiet_environment, read_reply


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("data")
    with quiet_environment(folder), our_page(folder) as target:
        yield target


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
        assert read_reply(link).status != 200


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
