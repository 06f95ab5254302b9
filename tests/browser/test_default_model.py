"""The main job, end to end: a real Chromium, the real app and engine, the shipped model.

The questions are held out: the model never saw them in training, and its report says that it
answers them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from assets.training.evaluate import questions
from assets.training.items import Item
from tests.browser.chat import Chat
from tests.browser.conftest import RunningApp, Watched, app_process, enter

MODEL = Path(__file__).resolve().parents[2] / "assets" / "default_model"


def answered(group: str) -> Item:
    """The longest answer of a class among the first questions that the report marks right."""
    classes = json.loads((MODEL / "report.json").read_text(encoding="utf-8"))["evaluation"]
    marks = classes["classes"][group]["outcomes"]
    asked = [item for name, item in questions(8) if name == group]
    right = [item for item, mark in zip(asked, marks, strict=False) if mark == "1"]
    return max((item for item in right if not item.before), key=lambda item: len(item.answer))


@pytest.fixture(scope="module")
def real_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with app_process(None, tmp_path_factory.mktemp("real-app")) as running:
        yield running


@pytest.fixture
def page(real_app: RunningApp, chromium: Browser) -> Iterator[Page]:
    rules = Watched(real_app.origin, forgive=["AbortError", "net::ERR_ABORTED"])
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    rules.watch(opened)
    opened.set_default_timeout(60_000)
    enter(opened, real_app)
    yield opened
    context.close()
    rules.check()


def plain(text: str) -> str:
    """Text as a person reads it: Markdown and line breaks do not count."""
    return " ".join(text.replace("*", "").split())


def test_a_held_out_question_is_answered_and_the_panel_moves(page: Page) -> None:
    item = answered("app")
    chat, panel = Chat(page), page.locator("#panel")
    expect(panel.get_by_role("button", name="emulated")).to_be_visible()
    ticks_before = page.evaluate("PreScope.ticks || 0")
    chat.send(item.question)
    chat.answering()
    page.wait_for_function("n => (PreScope.ticks || 0) > n", arg=ticks_before + 2)
    chat.settled()
    assert plain(chat.answers.last.inner_text()) == plain(item.answer)
    for key in ("tps", "ttft", "hit", "link"):
        expect(panel.locator(f"[data-k={key}]")).not_to_have_text("–")
    shares = [
        float(text.removesuffix(" %").lstrip("<"))
        for text in panel.locator(".ps-legend b").all_inner_texts()
    ]
    resident, _, _, on_demand, cpu = shares
    assert resident > 0, shares
    assert on_demand + cpu > 0, "a quarter of the experts in slots must show real misses"
    expect(chat.feet.last).to_contain_text("tokens/s")


def test_a_reload_in_mid_answer_loses_nothing(page: Page) -> None:
    item = answered("addition")
    chat = Chat(page)
    chat.send(item.question)
    chat.answering()
    page.reload()
    again = Chat(page)
    expect(again.questions.last).to_contain_text(plain(item.question)[:20])
    again.settled()
    expect(again.answers).to_have_count(1)
    assert plain(again.answers.last.inner_text()) == plain(item.answer)


def test_a_killed_engine_is_explained_and_the_next_answer_comes(
    page: Page, real_app: RunningApp
) -> None:
    chat = Chat(page)
    chat.ask("Hello!")
    children = psutil.Process(real_app.process.pid).children(recursive=True)
    engines = [child for child in children if "runtime.host" in " ".join(child.cmdline())]
    assert len(engines) == 1
    engines[0].kill()
    # Said while it restarts and again when it is back, but not in between, while the model loads.
    expect(page.locator("body")).to_contain_text("The engine stopped", timeout=60_000)
    expect(page.locator("body[data-engine=ready]")).to_have_count(1, timeout=60_000)
    item = answered("app")
    answer = chat.ask(item.question)
    assert plain(answer.inner_text()) == plain(item.answer)


def test_no_engine_outlives_a_killed_app(tmp_path: Path) -> None:
    with app_process(None, tmp_path) as running:
        app = psutil.Process(running.process.pid)
        deadline = time.monotonic() + 20
        while not (engines := app.children(recursive=True)):
            assert time.monotonic() < deadline, "the app started no engine"
            time.sleep(0.05)
        app.kill()
        _, alive = psutil.wait_procs([app, *engines], timeout=10)
        assert not alive
