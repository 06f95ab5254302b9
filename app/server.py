"""The app's process: one loopback socket, our routes, the page, and the guard around all of it.

`AppServer` owns the socket, the chats, the engine and the streams from its start to `close`.
`app.environment.prepare_environment` must run before, because building the page imports gradio.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import json
import logging
import os
import secrets
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse

from app.history import History
from app.live import LiveFeed
from app.models import ModelShelf
from app.plans import ModelPlans
from app.prediction import PredictionWatch
from app.security import Guard
from app.session import ChatSessions
from app.settings import SettingsStore, write_private
from runtime.client import EngineClient
from runtime.errors import ConfigError, PreScopeError

RUN_FILE = Path("run") / "app.json"
DEFAULT_MODEL = Path(__file__).parent.parent / "assets" / "default_model"
_PORTS_TRIED = 20
_READY_WITHIN_S = 30.0
_QUEUE_SLEEPS = {"sleep_when_free": 0.05, "progress_update_sleep_when_free": 0.1}
_log = logging.getLogger(__name__)


class AppServer:
    """One running app. `run` blocks until `leave`; `close` once, after it."""

    def __init__(
        self,
        data_dir: Path,
        port: int,
        make_engine: Callable[[Path], EngineClient],
        ui: ModuleType | Any = None,
    ) -> None:
        """Open the chats, start the engine and build the page; nothing is served yet.

        The chats come first: they refuse a second app before it has started anything. `ui` has
        `build_ui` and `mount`; `app.ui` unless a test brings its own.
        """
        self.data_dir = data_dir
        self.token = secrets.token_urlsafe(32)
        self.settings = SettingsStore(data_dir)
        self.history = History(data_dir / "chats")
        (data_dir / RUN_FILE).unlink(missing_ok=True)  # of an app that was killed
        with contextlib.ExitStack() as undo:
            undo.callback(self.history.close)
            self.engine = engine = make_engine(data_dir)
            undo.callback(engine.close)
            self._open(port, engine, ui or importlib.import_module("app.ui"))
            undo.pop_all()

    def _open(self, port: int, engine: EngineClient, ui: ModuleType | Any) -> None:
        self.sessions = ChatSessions(self.history, self.settings, engine)
        self.plans = ModelPlans(self.data_dir, self.settings)
        self.models = ModelShelf(
            self.settings, default_folder=DEFAULT_MODEL, plan_of=self.plans.label
        )
        prediction = PredictionWatch(self.settings, engine, self.sessions.progress)
        self.feed = LiveFeed(engine, prediction)
        self._socket = bind_loopback(port)
        self.port: int = self._socket.getsockname()[1]
        self.app = asyncio.run(self._build(ui))
        self._server = _Server(
            uvicorn.Config(
                Guard(self.app, port=self.port, token=self.token),
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=2,
            ),
            self.feed.stop,
        )

    @property
    def url(self) -> str:
        """The address that opens the page once, with its key."""
        return f"http://127.0.0.1:{self.port}/?t={self.token}"

    def run(self) -> None:
        """Serve until told to leave."""
        announcer = threading.Thread(target=self._announce, name="announce", daemon=True)
        announcer.start()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            announcer.join()

    def leave(self) -> None:
        """End `run` soon; any thread, and signal handlers."""
        self._server.leave()

    def close(self) -> None:
        """Save what is being answered, end the engine, and forget the run file."""
        self._socket.close()
        self.plans.close()
        self.sessions.close()
        self.engine.close()
        self.history.close()
        path = self.data_dir / RUN_FILE
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text()).get("token") == self.token:
                path.unlink()

    async def _build(self, ui: ModuleType | Any) -> FastAPI:
        """Build the page; inside a loop, or gradio makes several of its own and leaks them."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_route("/healthz", _healthz, methods=["GET"])
        app.add_route("/live", self.feed.respond, methods=["GET"])
        blocks = ui.build_ui(self.sessions, self.settings, self.engine, self.models)
        ui.mount(app, blocks)
        queue = getattr(blocks, "_queue", None)
        for name, seconds in _QUEUE_SLEEPS.items():
            if hasattr(queue, name):
                setattr(queue, name, seconds)
        return app

    def _announce(self) -> None:
        """Write the run file once the server really answers."""
        if self._server.wait_until_serving(_READY_WITHIN_S) and _answers(self.port):
            record = {"port": self.port, "token": self.token, "pid": os.getpid()}
            write_private(self.data_dir / RUN_FILE, json.dumps(record).encode())
            _log.info("serving on port %d", self.port)


class _Server(uvicorn.Server):
    """uvicorn that ends our streams first, so that leaving does not wait for them."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams
        self._settled = threading.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._end_streams()
        self._settled.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.leave()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._settled.set()

    def wait_until_serving(self, timeout_s: float) -> bool:
        return self._settled.wait(timeout_s) and self.started and not self.should_exit


async def _healthz(request: Any) -> JSONResponse:
    return JSONResponse({"ok": True, "app": "prescope", "pid": os.getpid()})


def bind_loopback(port: int) -> socket.socket:
    """Return a socket on 127.0.0.1 at `port`, or the next free one; 0 takes any.

    Raises:
        ConfigError: the number is not a port.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a port.", "Use a number from 1024 to 65535, or 0.")
    tried = [*range(port, min(port + _PORTS_TRIED, 65536)), 0] if port else [0]
    for number in tried:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if sys.platform == "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", number))
            bound.listen(128)
        except OSError:
            bound.close()
            continue
        return bound
    raise ConfigError("No port on this computer is free.", "Close a program and start again.")


def engine_maker(spec: str = "runtime.client:LocalEngine") -> Callable[[Path], EngineClient]:
    """Return what makes the engine that `module:Class` names.

    Raises:
        ConfigError: there is no such class.
    """
    module, _, name = spec.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"There is no engine {spec}: {error}.", "Install PreScope again."
        ) from error

    def make(data_dir: Path) -> EngineClient:
        engine: EngineClient = build(data_dir=data_dir)
        return engine

    return make


def start_loading(server: AppServer) -> None:
    """Ask for the model that was chosen last; a refusal is shown by the engine's status."""
    try:
        server.engine.load(server.settings.current().load_request())
    except PreScopeError as error:
        _log.warning("the chosen model was not loaded: %s", error.message)


def leave_on_signals(server: AppServer) -> None:
    """End `server.run` when the person or the system asks this process to end; main thread."""

    def leave(number: int, frame: FrameType | None) -> None:
        server.leave()

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)


def leave_with_parent(server: AppServer) -> None:
    """End `server.run` when standard input, if it is a pipe, reaches its end: no orphan stays."""
    try:
        piped = stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode)
    except OSError:
        piped = False

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        server.leave()

    if piped:
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _answers(port: int) -> bool:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", "/healthz")
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()
