"""The panel and the tabs: one stream for all of them, numbers that move, drawings that follow."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.chat import Chat
from tests.browser.conftest import Visit, ready

TABS = 8


def ticks(page: Page) -> int:
    count: int = page.evaluate("PreScope.ticks || 0")
    return count


def grows(page: Page, past: int) -> None:
    page.wait_for_function("n => (PreScope.ticks || 0) > n", arg=past)


def pixels(page: Page) -> str:
    picture: str = page.evaluate("document.querySelector('canvas.ps-heat').toDataURL()")
    return picture


def test_the_panel_follows_an_answer(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    panel = page.locator("#panel")
    why = page.locator("#ps-emulated-why")
    expect(why).to_be_hidden()
    panel.get_by_role("button", name="emulated").focus()
    expect(why).to_contain_text("not as a measurement")
    expect(why).to_be_visible()
    chat.send("Show me the panel !long")
    expect(panel.locator(".ps-state")).to_contain_text("Answering")
    expect(panel.locator("[data-k=limit]")).to_contain_text("token")
    for key in ("tps", "ttft", "hit", "stall", "link"):
        expect(panel.locator(f"[data-k={key}]")).not_to_have_text("–")
    expect(panel.locator("[data-k=linkof]")).to_contain_text("MB/s")
    shares = panel.locator(".ps-legend b").all_inner_texts()
    assert abs(sum(float(s.removesuffix(" %").lstrip("<")) for s in shares) - 100) < 0.6
    before, drawn = ticks(page), pixels(page)
    heat, tip = page.locator("canvas.ps-heat"), page.locator(".ps-tip")
    expect(heat).to_have_attribute("aria-label", re.compile("6 layers by 32 experts"))
    heat.hover(position={"x": 5, "y": 5})
    expect(tip).to_contain_text("Layer 0, expert 0")
    heat.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(tip).to_contain_text("Layer 1, expert 1")
    grows(page, before + 8)
    assert pixels(page) != drawn
    chat.stop()
    expect(panel.locator(".ps-state")).to_contain_text("Ready")
    expect(panel.locator("[data-k=tps]")).not_to_have_text("–")
    expect(panel.locator(".ps-panel.stale")).to_have_count(0)


@pytest.mark.timeout(300)
def test_eight_tabs_are_all_live_on_one_stream(chromium: Browser, visit: Visit) -> None:
    small = chromium.new_context(viewport={"width": 800, "height": 600}, reduced_motion="reduce")
    first = visit(profile=small)
    chat = Chat(first)
    chat.send("Keep eight tabs busy !slow !long")
    chat.answering()
    address = first.url.split("/")[-1]
    pages = [first] + [visit(address, profile=small, wait=False) for _ in range(TABS - 1)]
    for page in pages:
        ready(page)
        expect(Chat(page).answering()).to_contain_text("experts")
    marks = [ticks(page) for page in pages]
    for page, mark in zip(pages, marks, strict=True):
        grows(page, mark + 2)
    length = len(pages[0].locator("#live").inner_text())
    for page in pages:
        page.wait_for_function(
            "n => document.querySelector('#live').innerText.length > n", arg=length
        )
    assert sum(page.evaluate("PreScope.leading()") for page in pages) == 1
    Chat(pages[-1]).stop()
    for page in (pages[0], pages[-1]):
        Chat(page).settled()
        expect(Chat(page).feet.last).to_contain_text("Stopped")
    small.close()


def test_two_tabs_agree_and_one_takes_over_from_the_other(visit: Visit) -> None:
    first, second = visit(), visit()
    chat = Chat(first)
    chat.ask("Seen in both tabs?")
    expect(Chat(second).row("Seen in both tabs?")).to_have_count(1)
    Chat(second).row("Seen in both tabs?").locator(".go").click()
    expect(Chat(second).answers).to_have_count(1)
    chat.ask("And a second time?")
    expect(Chat(second).questions).to_have_count(2)
    expect(Chat(second).answers).to_have_count(2)
    Chat(second).type("A draft in the second tab")
    second.reload()
    ready(second)
    expect(Chat(second).box).to_have_value("A draft in the second tab")
    expect(Chat(second).answers).to_have_count(2)
    row = chat.row("Seen in both tabs?")
    row.locator(".go").focus()
    first.keyboard.press("Delete")
    first.keyboard.press("Delete")
    expect(Chat(second).questions).to_have_count(0)
    expect(Chat(second).box).to_have_value("A draft in the second tab")
    assert first.evaluate("PreScope.leading()")
    assert not second.evaluate("PreScope.leading()")
    first.close()
    second.wait_for_function("PreScope.leading()")
    mark = ticks(second)
    Chat(second).send("Are you still there? !long")
    grows(second, mark + 3)
    Chat(second).stop()
