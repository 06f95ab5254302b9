"""The app as a process: one stream, small, quiet, offline, private, and never an orphan."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from app import live, server
from app.history import INTERRUPTED, History
from app.live import LiveFeed
from app.pace import Progress
from app.prediction import PredictionWatch
from app.settings import SettingsStore
from runtime.errors import ConfigError
from tests.fake_engine import FakeEngine

SOON_S = 60.0
ROOT = Path(__file__).parent.parent
ENGINE = "tests.fake_engine:FakeEngine"
MARKER = "prompt-marker-91c7"
# Runs the real command, with three observers: names looked up, modules imported, a chat asked.
OBSERVED = """
import atexit, json, socket, sys
from app import __main__, server
names, data = [], sys.argv[sys.argv.index("--data-dir") + 1]
real = socket.getaddrinfo
def looked_up(host, *rest, **more):
    names.append(str(host))
    return real(host, *rest, **more)
socket.getaddrinfo = looked_up
class Observed(server.AppServer):
    def run(self):
        self.sessions.send(None, "MARKER !slow !long")
        dying = self.sessions.send(None, "MARKER !die")
        view = self.sessions.view(dying)
        while view.live is not None:
            view = self.sessions.wait(dying, view.live.version, 5)
        super().run()
server.AppServer = Observed
def report():
    never = ("torch", "transformers", "llvmlite", "numpy.f2py")
    heavy = [name for name in never if name in sys.modules]
    stubs = sys.modules["gradio.component_meta"].create_or_modify_pyi.__module__
    with open(data + "/report.json", "w") as file:
        json.dump({"names": names, "heavy": heavy, "stubs": stubs}, file)
atexit.register(report)
sys.exit(__main__.main())
""".replace("MARKER", MARKER)


class Running:
    """One app process and what its run file says."""

    def __init__(self, data_dir: Path, *command: str, port: int = 0) -> None:
        self.data_dir = data_dir
        self.run_file = data_dir / server.RUN_FILE
        self.process = subprocess.Popen(
            [
                sys.executable,
                *(command or ("-m", "app")),
                "--data-dir",
                str(data_dir),
                "--engine",
                ENGINE,
                "--port",
                str(port),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def record(self) -> dict[str, Any]:
        """Wait for the run file and return it."""
        wait_for(lambda: self.run_file.exists() or self.process.poll() is not None)
        record: dict[str, Any] = json.loads(self.run_file.read_text())
        return record

    def end(self, how: Callable[[], None]) -> int:
        """Do something that should end the process; return its exit status."""
        how()
        try:
            return self.process.wait(SOON_S)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def wait_for(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(port: int, path: str, *lines: str) -> bytes:
    """Return the raw answer to one GET, up to the end of the body or 64 KiB."""
    head = "\r\n".join([f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines])
    with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as link:
        link.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n")
        raw = b""
        while len(raw) < 65536 and (more := link.recv(65536)):
            raw += more
        return raw


def sign_in(record: dict[str, Any]) -> str:
    raw = ask(record["port"], f"/?t={record['token']}").decode()
    cookie = next(line for line in raw.split("\r\n") if line.startswith("set-cookie: "))
    return "Cookie: " + cookie.split(": ")[1].split(";")[0]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One app that runs while the tests of a healthy app look at it."""
    app = Running(tmp_path_factory.mktemp("data"), "-c", OBSERVED)
    app.record()
    yield app
    app.close()


def test_the_page_is_served_to_who_has_the_link(observed: Running) -> None:
    record = observed.record()
    assert record["pid"] == observed.process.pid
    cookie = sign_in(record)
    page = ask(record["port"], "/", cookie)
    assert page.startswith(b"HTTP/1.1 200 OK")
    assert b"PreScope" in page
    health = ask(record["port"], "/healthz")
    assert json.loads(health.split(b"\r\n\r\n")[1]) == {
        "ok": True,
        "app": "prescope",
        "pid": record["pid"],
    }


def test_the_stream_tells_status_snapshot_and_limit(observed: Running) -> None:
    record = observed.record()
    event = json.loads(live_event(record))
    assert set(event) == {"status", "snapshot", "prediction", "limit"}
    assert event["prediction"]["on"] is True
    assert set(event["limit"]) == {"cause", "text", "advice"}
    assert event["status"]["state"] in ("loading", "ready", "restarting")


def test_only_loopback_listens(observed: Running) -> None:
    process = psutil.Process(observed.process.pid)
    listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


def test_the_process_is_small(observed: Running) -> None:
    ask(observed.record()["port"], "/", sign_in(observed.record()))
    used = psutil.Process(observed.process.pid).memory_info().rss
    assert used < 200e6


def test_the_token_is_no_argument(observed: Running) -> None:
    words = psutil.Process(observed.process.pid).cmdline()
    assert not any(observed.record()["token"] in word for word in words)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
def test_only_this_user_can_read_anything(observed: Running) -> None:
    open_to_others = [path for path in observed.data_dir.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []


def test_hanging_up_ends_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The launcher holds our standard input; when it is gone, so are we."""
    app = Running(tmp_path / "PreScope é 1", "-c", OBSERVED)
    record = app.record()
    assert ask(record["port"], "/", sign_in(record)).startswith(b"HTTP/1.1 200 OK")
    assert live_event(record)
    history_file = app.data_dir / "chats"
    assert app.end(app.hang_up) == 0
    assert not app.run_file.exists()
    report = json.loads((app.data_dir / "report.json").read_text())
    assert report["heavy"] == []
    assert set(report["names"]) <= {"127.0.0.1", "localhost"}
    log = "".join(path.read_text() for path in (app.data_dir / "logs").iterdir())
    assert "serving on port" in log
    assert MARKER not in log
    assert "Traceback" not in log
    history = History(history_file)
    errors = {history.messages(chat.id)[1].error for chat in history.conversations()}
    history.close()
    assert errors == {
        INTERRUPTED,
        "The engine stopped in the middle of the answer. Retry to ask again.",
    }
    assert report["stubs"] == "app.environment", "gradio would write stubs into our tree"
    assert list(ROOT.glob("app/**/*.pyi")) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_in_order_though_a_page_listens(tmp_path: Path, name: str) -> None:
    stale = tmp_path / server.RUN_FILE
    stale.parent.mkdir()
    stale.write_text('{"port": 1, "token": "of an app that was killed", "pid": 1}')
    app = Running(tmp_path)
    wait_for(lambda: b"killed" not in (stale.read_bytes() if stale.exists() else b""))
    record = app.record()
    with listening(record) as link:
        first_event(link)
        assert app.end(lambda: app.process.send_signal(getattr(signal, name))) == 0
    assert not app.run_file.exists()
    assert not list((tmp_path / "chats").glob("*-wal"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_idle_app_sleeps_and_a_second_one_is_refused(tmp_path: Path) -> None:
    """Stock Gradio wakes 840 times a second when idle (measured); the bound is an eighth of it."""
    app = Running(tmp_path)
    record = app.record()
    process = psutil.Process(app.process.pid)

    def wakes() -> int:
        statuses = Path(f"/proc/{process.pid}/task").glob("*/status")
        lines = [line for status in statuses for line in status.read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))

    wait_for(lambda: b'"ready"' in live_event(record))
    before, started = wakes(), time.monotonic()
    time.sleep(2.0)
    per_s = (wakes() - before) / (time.monotonic() - started)
    print(f"\nidle wake-ups per second: {per_s:.0f}, RSS {process.memory_info().rss / 1e6:.0f} MB")
    assert per_s < 105
    second = Running(tmp_path)
    assert second.process.wait(SOON_S) == 2
    assert second.process.stderr is not None
    assert b"in use by another PreScope" in second.process.stderr.read()
    second.close()
    assert json.loads(app.run_file.read_text()) == record
    assert app.end(lambda: app.process.send_signal(signal.SIGINT)) == 0


@contextlib.contextmanager
def listening(record: dict[str, Any]) -> Iterator[socket.socket]:
    """Open the live stream as a signed-in page would."""
    with socket.create_connection(("127.0.0.1", record["port"]), timeout=SOON_S) as link:
        head = f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{record['port']}\r\n{sign_in(record)}\r\n"
        link.sendall(head.encode() + b"\r\n")
        yield link


def first_event(link: socket.socket) -> bytes:
    raw = b""
    while b"\n\n" not in raw.partition(b"\ndata: ")[2]:
        raw += link.recv(65536)
    return raw.partition(b"\ndata: ")[2].partition(b"\n\n")[0]


def live_event(record: dict[str, Any]) -> bytes:
    with listening(record) as link:
        return first_event(link)


@pytest.mark.parametrize("kept_by_launcher", [True, False])
def test_every_line_is_logged_once_whoever_keeps_the_file(
    tmp_path: Path, kept_by_launcher: bool
) -> None:
    """A launcher may have opened the log as our standard error; then it is not rotated here."""
    path = tmp_path / "app.log"
    code = (
        "import logging, pathlib, sys; from app.environment import log_to;"
        " log_to(pathlib.Path(sys.argv[1])); logging.getLogger('x').info('one line');"
        " print([type(h).__name__ for h in logging.getLogger().handlers])"
    )
    with path.open("ab") if kept_by_launcher else open(os.devnull, "wb") as errors:
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            check=True,
        )
    assert path.read_text().count("one line") == 1
    assert (b"Rotating" in said.stdout) == (not kept_by_launcher)


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="not a port"):
        server.bind_loopback(port)


def test_a_taken_port_gives_the_next_free_one() -> None:
    first = server.bind_loopback(0)
    taken = first.getsockname()[1]
    second = server.bind_loopback(taken)
    assert second.getsockname()[0] == "127.0.0.1"
    assert second.getsockname()[1] != taken
    first.close()
    second.close()


@pytest.mark.parametrize("spec", ["nowhere:Engine", "tests.fake_engine:Nothing", "", ":"])
def test_an_engine_that_is_not_there_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="There is no engine"):
        server.engine_maker(spec)


class PlainUi:
    """A page without gradio, for what does not depend on the page."""

    @staticmethod
    def build_ui(*_: Any) -> object:
        return object()

    @staticmethod
    def mount(app: Any, blocks: object) -> None:
        """Serve nothing at `/`."""


def test_what_is_being_answered_survives_the_end_of_the_app(tmp_path: Path) -> None:
    app = server.AppServer(tmp_path, 0, lambda _: FakeEngine(load_s=0.0), PlainUi)
    server.start_loading(app)
    thread = threading.Thread(target=app.run)
    thread.start()
    wait_for((tmp_path / server.RUN_FILE).exists)
    chat = app.sessions.send(None, "go !slow !long")
    wait_for(lambda: bool((view := app.sessions.view(chat)).live and view.live.text))
    app.leave()
    thread.join(SOON_S)
    app.close()
    assert not (tmp_path / server.RUN_FILE).exists()
    history = History(tmp_path / "chats")
    last = history.messages(chat)[-1]
    history.close()
    assert last.content
    assert last.error == INTERRUPTED


class StillEngine(FakeEngine):
    """An engine whose picture changes only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def status(self) -> Any:
        self.looks += 1
        return super().status()

    def move(self) -> None:
        self._status = replace(self._status, restarts=self._status.restarts + 1)


def feed_events(
    monkeypatch: pytest.MonkeyPatch, script: Callable[[LiveFeed, StillEngine], Any]
) -> StillEngine:
    monkeypatch.setattr(live, "TICK_S", 0.01)
    monkeypatch.setattr(live, "KEEP_ALIVE_S", 0.05)
    engine = StillEngine()
    with tempfile.TemporaryDirectory() as folder:
        prediction = PredictionWatch(SettingsStore(Path(folder)), engine, Progress)
        feed = LiveFeed(engine, prediction)
        asyncio.run(asyncio.wait_for(script(feed, engine), SOON_S))
    return engine


def test_the_feed_is_silent_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(feed: LiveFeed, engine: StillEngine) -> None:
        stream = feed._stream()
        first = await anext_of(stream)
        assert first.startswith(b"data: ")
        for _ in range(3):
            assert (await anext_of(stream)).startswith(b": ")
        assert feed.serialised == 1
        engine.move()
        assert b'"restarts":1' in await anext_of(stream)
        assert feed.serialised == 2
        await stream.aclose()

    feed_events(monkeypatch, script)


def test_all_pages_share_one_picture_and_slow_ones_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(feed: LiveFeed, engine: StillEngine) -> None:
        streams = [feed._stream() for _ in range(5)]
        for stream in streams:
            await anext_of(stream)
        for _ in range(4):
            engine.move()
            assert b"data: " in await anext_of(streams[0])
        latest = [await anext_of(stream) for stream in streams[1:]]
        assert all(b'"restarts":4' in event for event in latest)
        assert feed.serialised == 5
        for stream in streams:
            await stream.aclose()

    feed_events(monkeypatch, script)


def test_the_feed_rests_when_no_page_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(feed: LiveFeed, engine: StillEngine) -> None:
        stream = feed._stream()
        await anext_of(stream)
        await stream.aclose()
        while feed._producer is not None:
            await asyncio.sleep(0.01)
        looks = engine.looks
        await asyncio.sleep(0.1)
        assert engine.looks == looks
        again = feed._stream()
        engine.move()
        assert b'"restarts":1' in await anext_of(again)
        await again.aclose()

    feed_events(monkeypatch, script)


def test_the_feed_ends_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(feed: LiveFeed, engine: StillEngine) -> None:
        stream = feed._stream()
        await anext_of(stream)
        threading.Timer(0.02, feed.stop).start()
        assert [event async for event in stream if event.startswith(b"data")] == []

    feed_events(monkeypatch, script)


async def anext_of(stream: Any) -> bytes:
    event: bytes = await stream.__anext__()
    return event
