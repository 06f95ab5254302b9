"""A real app process and a real Chromium, and nothing else: no network, no shared data folder.

`app_process` starts `python -m app` in a fresh data folder; `engine=None` is the real engine. Every
page that `visit` opens is watched: a console error, an uncaught error or a request to another
origin fails the test that caused it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FAKE_ENGINE = "tests.fake_engine:FakeEngine"
STARTS_WITHIN_S = 60.0
ENDS_WITHIN_S = 15.0
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Patience, not a bound: what is expected comes in a second where nothing else runs.
expect.set_options(timeout=30_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)


@dataclass
class RunningApp:
    """One app process; `url` carries the launch token."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    port: int
    token: str

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/?t={self.token}"


@contextlib.contextmanager
def app_process(
    engine: str | None = FAKE_ENGINE, data_dir: Path | None = None, port: int = 0
) -> Iterator[RunningApp]:
    """Run the app until the block ends; `engine` None is the real one."""
    assert data_dir is not None, "every app needs its own data folder"
    data_dir.mkdir(parents=True, exist_ok=True)
    run_file = data_dir / "run" / "app.json"
    run_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "app", "--data-dir", str(data_dir), "--port", str(port)]
    if engine is not None:
        command += ["--engine", engine]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not run_file.exists():
            if process.poll() is not None:
                pytest.fail(f"the app ended: {process.communicate()[1].decode()[-2000:]}")
            assert time.monotonic() < deadline, "the app did not start in time"
            time.sleep(0.05)
        record = json.loads(run_file.read_text())
        yield RunningApp(process, data_dir, record["port"], record["token"])
    finally:
        process.terminate()
        try:
            process.communicate(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@dataclass
class Watched:
    """What a page must not do; `forgive` names parts of messages a test expects."""

    origin: str
    problems: list[str] = field(default_factory=list)
    forgive: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on(
            "console", lambda m: self._note(f"console: {m.text}") if m.type == "error" else None
        )
        page.on("pageerror", lambda error: self._note(f"uncaught: {error}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("dialog", lambda dialog: self._note(f"dialog: {dialog.message}"))

    def check(self) -> None:
        left = [p for p in self.problems if not any(part in p for part in self.forgive)]
        assert left == []

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("data", "blob", "about"):
            return
        if f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.problems.append(f"request to {url}")


Visit = Callable[..., Page]


def chromium_path() -> str | None:
    """Return the Chromium to drive: `PRESCOPE_CHROMIUM`, or one on the path."""
    named = os.environ.get("PRESCOPE_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """One browser for these tests only: while it runs, its event loop runs in this thread."""
    path = chromium_path()
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """One app on the fake engine, shared: tests use conversations of their own."""
    data_dir = tmp_path_factory.mktemp("shared-app")
    write_models(data_dir)
    with app_process(FAKE_ENGINE, data_dir) as running:
        yield running


@pytest.fixture
def watched(app: RunningApp) -> Iterator[Watched]:
    rules = Watched(app.origin)
    yield rules
    rules.check()


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    made = chromium.new_context(
        viewport={"width": 1440, "height": 900},
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    yield made
    made.close()


@pytest.fixture
def visit(app: RunningApp, watched: Watched, context: BrowserContext) -> Visit:
    """Open a watched page in this test's own browser profile, ready to type into."""

    def open_page(
        hash: str = "", *, profile: BrowserContext | None = None, wait: bool = True
    ) -> Page:
        page = (profile or context).new_page()
        watched.watch(page)
        if wait:
            enter(page, app, hash)
        else:
            page.goto(f"{app.origin}/{hash}", wait_until="commit")
        return page

    return open_page


def enter(page: Page, app: RunningApp, hash: str = "") -> None:
    """Open the app, with its key the first time, and wait until one can type and be answered."""
    known = any(c["name"] == f"prescope_{app.port}" for c in page.context.cookies())
    page.goto(f"{app.origin}/{hash}" if known else app.url)
    ready(page)


def ready(page: Page) -> None:
    expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
    expect(page.locator("body[data-engine=ready]")).to_have_count(1, timeout=60_000)


def write_models(data_dir: Path) -> None:
    """Add a folder of pretend models, and name it in the settings."""
    folder = data_dir / "models"
    for name in ("broken-8x7b", "endless-120b", "tiny-moe", "dense-7b"):
        (folder / name).mkdir(parents=True)
        config = {"model_type": "mixtral"} | ({} if "dense" in name else {"num_local_experts": 8})
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "model.safetensors").write_bytes(b"\0" * 4096)
    settings = {"version": 1, "model_folders": [str(folder)]}
    (data_dir / "settings.json").write_text(json.dumps(settings))
