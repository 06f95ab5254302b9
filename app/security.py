"""The guard in front of every route: pure ASGI, so that streams are not buffered.

A page on the open web, another user of this computer, and another program that guesses the port
all reach a server on loopback. Each request must therefore name us exactly (DNS rebinding), come
from our own page (forged requests), and carry the cookie that only the launch link hands out.
Answers forbid framing, sniffing, reading from other origins and loading anything from elsewhere.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from html import escape
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
_SAFE_METHODS = ("GET", "HEAD")
_METHODS = (*_SAFE_METHODS, "OPTIONS", "POST", "PUT", "DELETE", "PATCH")
# Gradio cannot run without inline scripts and `eval` (its templates are compiled); the list still
# forbids every load from another origin, which is how a model's output would leak a chat.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
HEADERS = {
    b"content-security-policy": CONTENT_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"vary": b"Origin",
}
_SHUT = (
    ("/gradio_api/upload", "Uploads are off."),
    ("/gradio_api/proxy=", "Fetching from elsewhere is off."),
    ("/gradio_api/component_server", "This call is off."),
    ("/gradio_api/process_recording", "Uploads are off."),
    ("/gradio_api/deep_link", "Sharing is off."),
    ("/gradio_api/dev", "Development calls are off."),
    ("/gradio_api/vibe", "Development calls are off."),
    ("/monitoring", "Monitoring is off."),
)
_FILE = ("/gradio_api/file=", "/file=")
_LOCKED_OUT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>PreScope</title>
<meta name="viewport" content="width=device-width"><style>body{{font:16px/1.6 system-ui,sans-serif;
max-width:34rem;margin:15vh auto;padding:0 1.5rem;color-scheme:light dark}}</style>
<h1>Open PreScope from its launcher</h1>
<p>This window has no key for the PreScope that runs now. It may be from an earlier start, from
another browser, or the address was typed in.</p>
<p>Double-click PreScope again: it does not start twice, it opens this page with the right key.
Your chats are safe.</p><p><small>{host}</small></p></html>"""


class Guard:
    """Wraps the whole app; holds the launch token and the cookie it is exchanged for."""

    def __init__(
        self, app: AsgiApp, *, port: int, token: str, open_paths: tuple[str, ...] = ("/healthz",)
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._cookie_name = f"prescope_{port}"
        self._cookie = secrets.token_urlsafe(32)
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"}
        self._origins = {f"http://{host}" for host in self._hosts}
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, exchange the launch token, or pass the request on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
        elif scope["path"] in self._open_paths or self._known(headers):
            await self._app(scope, _capped(receive), _with_headers(send))
        elif self._carries_token(scope):
            await self._let_in(send)
        else:
            await self._lock_out(scope, headers, send)

    def _refusal(self, scope: Scope, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        """Return the status and the reason to refuse this request, None to go on."""
        method, path = scope["method"], scope["path"]
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 421, "This address is not PreScope's."
        if method not in _METHODS:
            return 405, "This method is not served."
        if any(origin not in self._origins for origin in origins) or len(origins) > 1:
            return 403, "The request comes from another page."
        navigates = (
            method == "GET" and path == "/" and headers.get("sec-fetch-mode") == ["navigate"]
        )
        sites = headers.get("sec-fetch-site", [])
        if any(site not in ("same-origin", "none") for site in sites) and not navigates:
            return 403, "The request comes from another site."
        if method not in _SAFE_METHODS and not origins and not self._bearer(headers):
            return 403, "A request that changes something must say where it comes from."
        for prefix, reason in _SHUT:
            if path.startswith(prefix):
                return 403, reason
        if path.startswith(_FILE) and ("//" in path or ":" in path.split("file=", 1)[1][2:]):
            return 403, "Fetching from elsewhere is off."
        lengths = headers.get("content-length", [])
        if any(not length.isdecimal() or int(length) > MAX_BODY_BYTES for length in lengths):
            return 413, f"A request may have at most {MAX_BODY_BYTES} bytes."
        return None

    def _known(self, headers: dict[str, list[str]]) -> bool:
        for line in headers.get("cookie", []):
            for part in line.split(";"):
                name, _, value = part.strip().partition("=")
                if name == self._cookie_name and _same(value, self._cookie.encode()):
                    return True
        return self._bearer(headers)

    def _bearer(self, headers: dict[str, list[str]]) -> bool:
        given = headers.get("authorization", [])
        return len(given) == 1 and _same(given[0], b"Bearer " + self._token)

    def _carries_token(self, scope: Scope) -> bool:
        if scope["method"] != "GET" or scope["path"] != "/":
            return False
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("t", [])
        return len(given) == 1 and _same(given[0], self._token)

    async def _let_in(self, send: Send) -> None:
        cookie = f"{self._cookie_name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(
            send, 303, "", {b"location": b"/", b"set-cookie": cookie.encode()}, "text/plain"
        )

    async def _lock_out(self, scope: Scope, headers: dict[str, list[str]], send: Send) -> None:
        if scope["method"] == "GET" and scope["path"] == "/":
            page = _LOCKED_OUT.format(host=escape(headers["host"][0]))
            await _answer(send, 401, page, content_type="text/html")
        else:
            await _answer(send, 401, "Open PreScope from its launcher.")


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _same(given: str, secret: bytes) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret)


async def _answer(
    send: Send,
    status: int,
    text: str,
    extra: dict[bytes, bytes] | None = None,
    content_type: str = "text/plain",
) -> None:
    body = text.encode()
    headers = {
        b"content-type": f"{content_type}; charset=utf-8".encode(),
        b"content-length": str(len(body)).encode(),
        b"cache-control": b"no-store",
        **HEADERS,
        **(extra or {}),
    }
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """Return a `send` that sets our headers and lets no cross-origin permission out."""

    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if name.lower() not in HEADERS and not name.lower().startswith(b"access-control-")
            ]
            message = {**message, "headers": kept + list(HEADERS.items())}
        await send(message)

    return guarded


def _capped(receive: Receive) -> Receive:
    """Return a `receive` that hangs up on a body that grows past the limit."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > MAX_BODY_BYTES else message

    return counted
