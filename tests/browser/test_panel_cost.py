"""What watching costs: the same answers with the panel open and with no page at all."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.chat import Chat
from tests.browser.conftest import app_process, enter

QUESTION = "Tell me a story about a fox named Zoe, a silver lamp and the harbor."
AWAY_S = 6.0
"""Longer than the answer takes: nobody looks while it is written."""
ROUNDS = 3
BUSY_PERCENT = 50.0
"""Of the whole machine, before anything of ours runs: the page and the engine would get no core
each, and the two sides would tell who else is there."""
LEAST_RATIO = 0.8
"""Of the speed without a page; the two sides alternate in one run on the same machine."""


def tokens_per_s(chat: Chat) -> float:
    chat.settled()
    found = re.search(r"([\d.]+) tokens/s", chat.feet.last.inner_text())
    assert found, chat.feet.last.inner_text()
    return float(found[1])


def ask(page: Page, leave: bool) -> float:
    chat = Chat(page)
    page.get_by_role("button", name="New chat").click()
    expect(chat.questions).to_have_count(0)
    chat.send(QUESTION)
    address = page.url
    if leave:
        page.goto("about:blank")
        time.sleep(AWAY_S)
        page.goto(address)
    return tokens_per_s(chat)


@pytest.mark.alone
def test_watching_does_not_slow_the_answer(chromium: Browser, tmp_path: Path) -> None:
    if psutil.cpu_percent(interval=1.0) > BUSY_PERCENT:
        pytest.skip("something else keeps this machine busy")
    with app_process(None, tmp_path) as app:
        context = chromium.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        enter(page, app)
        ask(page, leave=False)
        rounds = [(ask(page, leave=False), ask(page, leave=True)) for _ in range(ROUNDS)]
        context.close()
    watched, alone = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"tokens/s with the panel open / with no page: {watched / alone:.2f}")
    assert watched / alone >= LEAST_RATIO, rounds
