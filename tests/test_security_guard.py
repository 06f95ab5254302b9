"""The guard by itself, spoken to as a more lenient server would: it refuses unless all is right."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import security


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
