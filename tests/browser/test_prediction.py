"""Prediction on the page: one switch for all tabs, figures with the right lengths, a pair."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from runtime.core import POLICIES
from tests.browser.chat import Chat
from tests.browser.conftest import FAKE_ENGINE, RunningApp, Visit, app_process
from tests.browser.test_keyboard_and_small import SIDEWAYS

STICKING_OUT = """() => [...document.querySelectorAll('#panel .ps-panel *')].filter(e => {
  const r = e.getBoundingClientRect(), room = document.querySelector('#panel');
  const pad = parseFloat(getComputedStyle(room.querySelector('.ps-panel')).paddingRight);
  return r.width && !e.closest('[role=tooltip], .ps-tip')
    && r.right > room.getBoundingClientRect().right - pad + 1;
}).map(e => e.tagName + '.' + (e.dataset.k || e.className)).slice(0, 5)"""
BARS = """() => {
  const canvas = document.querySelector('canvas.ps-stalls'), g = canvas.getContext('2d');
  const n = PreScope.latest.live.snapshot.stall_s_by_layer.length, { width, height } = canvas;
  const skip = 3 * (devicePixelRatio || 1);
  return Array.from({ length: n }, (_, l) => {
    const row = g.getImageData(skip, Math.floor(((l + 0.5) * height) / n), width - skip, 1).data;
    let length = 0;
    for (let i = 3; i < row.length; i += 4) if (row[i] > 0) length++;
    return length;
  });
}"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """An app of this file's own: the switch and the policy belong to everybody who uses one."""
    with app_process(FAKE_ENGINE, tmp_path_factory.mktemp("prediction-app")) as running:
        yield running


def switch(page: Page) -> Locator:
    return page.locator("#panel").get_by_role("switch", name="Prediction")


def block(page: Page) -> Locator:
    return page.locator("#panel .ps-ahead")


def snapshot(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate("PreScope.latest.live.snapshot")
    return found


def settings_opened(page: Page) -> Locator:
    page.get_by_role("button", name="Settings", exact=True).click()
    drawer = page.locator("#drawer")
    expect(drawer).to_be_visible()
    return drawer


def test_the_switch_works_in_mid_answer_and_in_every_tab(visit: Visit) -> None:
    first, second = visit(), visit()
    Chat(first).send("Predict this !long")
    for page in (first, second):
        expect(switch(page)).to_have_attribute("aria-checked", "true")
        expect(block(page)).to_have_attribute("data-state", "working")
    expect(block(first)).to_contain_text("Copying ahead pays here")
    expect(block(first)).to_contain_text("54.0 → 60.0 tok/s")
    expect(block(first)).to_contain_text("not used yet")
    first.wait_for_function("PreScope.latest.live.snapshot.tokens_per_s > 0")
    first.wait_for_timeout(1500)  # what comes before the switch has to be long enough to count
    tall = block(first).bounding_box()

    switch(first).focus()
    first.keyboard.press("Space")
    for page in (first, second):
        expect(switch(page)).to_have_attribute("aria-checked", "false")
        expect(block(page).locator(".ps-say")).to_contain_text("Prediction is off")
        expect(block(page).locator(".ps-figures")).to_be_hidden()
        expect(block(page)).to_contain_text("Your switch, on → off")
    assert not snapshot(second)["prediction"]
    first.bring_to_front()
    assert tall is not None
    # A tab that lay behind another one is laid out anew once it is in front.
    first.wait_for_function(
        "tall => Math.abs(document.querySelector('#panel .ps-ahead').getBoundingClientRect().height"
        " - tall) <= 1",
        arg=tall["height"],
    )
    pair = first.locator("#panel [data-k=switched]")
    expect(pair).to_have_text(re.compile(r"^\d+\.\d → \d+\.\d tok/s$"))
    expect(first.locator("#panel [data-k=switchchange]")).to_have_text(re.compile(r"^[+−±]\d+ %$"))
    expect(second.locator("#panel [data-k=switched]")).to_have_text(re.compile(r"tok/s$"))

    switch(second).click()
    for page in (first, second):
        expect(switch(page)).to_have_attribute("aria-checked", "true")
        expect(block(page)).to_have_attribute("data-state", "working")
        expect(block(page)).to_contain_text("Your switch, off → on")
    Chat(first).settled()
    drawer = settings_opened(second)
    inner = drawer.get_by_role("switch", name="Prediction")
    expect(inner).to_have_attribute("aria-checked", "true")
    inner.click()
    expect(switch(first)).to_have_attribute("aria-checked", "false")
    second.reload()
    expect(switch(second)).to_have_attribute("aria-checked", "false")
    switch(second).click()
    expect(switch(first)).to_have_attribute("aria-checked", "true")


def test_the_bars_are_as_long_as_their_figures(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    chat.ask("How long are the bars?")
    page.wait_for_function("!PreScope.latest.live.snapshot.generating")
    expect(block(page)).to_have_attribute("data-state", "working")
    now = snapshot(page)
    moved = now["prefetch_bytes_per_token"]
    bars = page.locator("#panel [data-k=aheadbar] i")
    widths = [bars.nth(i).bounding_box()["width"] for i in range(3)]  # type: ignore[index]
    for width, part in zip(widths, moved, strict=True):
        assert width / sum(widths) == pytest.approx(part / sum(moved), abs=0.01)
    said = page.locator("#panel [data-k=aheadkeys] b").all_inner_texts()
    assert [float(text) for text in said] == pytest.approx([v / 1e3 for v in moved], abs=0.6)
    expect(page.locator("#panel [data-k=aheadunit]")).to_have_text("kB/token")
    recall = page.locator("#panel [data-k=recall]").inner_text()
    assert float(recall.removesuffix(" %")) == pytest.approx(
        100 * now["predictor_recall"], abs=0.51
    )
    expect(page.locator("#panel [data-k=precision]")).to_have_text("64 %")
    expect(page.locator("#panel [data-k=cost]")).to_have_text("0.21 ms")

    waits = now["stall_s_by_layer"]
    lengths = page.evaluate(BARS)
    for length, wait in zip(lengths, waits, strict=True):
        assert length / max(lengths) == pytest.approx(wait / max(waits), abs=0.06)
    canvas, tip = page.locator("canvas.ps-stalls"), page.locator(".ps-tip")
    expect(canvas).to_have_attribute("aria-label", re.compile("most in layer 5"))
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(tip).to_have_text(f"Layer 1 waits {1000 * waits[1]:.1f} ms per token")
    canvas.hover(position={"x": 5, "y": 2})
    expect(tip).to_contain_text("Layer 0 waits")
    heat, beside = page.locator("canvas.ps-heat").bounding_box(), canvas.bounding_box()
    assert heat is not None
    assert beside is not None
    assert (heat["y"], heat["height"]) == (beside["y"], beside["height"])


def test_the_settings_name_every_policy(visit: Visit) -> None:
    drawer = settings_opened(visit())
    choices = drawer.locator("#set-policy label")
    expect(choices).to_have_count(1 + len(POLICIES))
    for text in choices.all_inner_texts():
        label, what = text.strip().split("\n")
        assert label
        assert what.endswith(".")


def test_a_policy_that_copies_nothing_ahead_says_so(visit: Visit) -> None:
    page = visit()
    drawer = settings_opened(page)
    drawer.get_by_label("Hybrid").check()
    inner = drawer.get_by_role("switch", name="Prediction")
    expect(inner).to_have_attribute("aria-disabled", "true")
    drawer.get_by_label("Close settings").click()
    expect(block(page)).to_have_attribute("data-state", "never")
    expect(block(page).locator(".ps-say")).to_contain_text("Hybrid copies nothing ahead")
    switch(page).click(force=True)
    page.wait_for_timeout(600)  # two looks of the live stream: time enough to be wrong
    assert page.evaluate("PreScope.latest.live.prediction.on") is True
    drawer = settings_opened(page)
    label = "PreScope" if "prescope" in POLICIES else "On demand"
    choices = drawer.locator("#set-policy label")
    choices.filter(has_text=re.compile(rf"^\s*{label}\s")).click()
    if "prescope" in POLICIES:
        expect(inner).to_have_attribute("aria-disabled", "false")


def test_what_was_learned_is_forgotten_after_a_second_press(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    chat.ask("Learn a little !long")
    assert snapshot(page)["predictor_recall"] > 0.5
    drawer = settings_opened(page)
    forget = drawer.locator(".ps-forget")
    forget.click()
    expect(forget).to_have_text("Forget? Press again")
    page.keyboard.press("Tab")
    expect(forget).to_have_text("Forget what was learned")
    forget.click()
    forget.click()
    expect(drawer.locator(".ps-forgetting .ps-said")).to_have_text("Forgotten.")
    page.wait_for_function("PreScope.latest.live.snapshot.predictor_recall < 0.41")


def test_two_tabs_are_answered_at_the_same_time(visit: Visit) -> None:
    first, second = visit(), visit()
    one, two = Chat(first), Chat(second)
    one.send("The first of two !slow !long")
    two.send("The second of two !slow !long")
    for page, chat in ((first, one), (second, two)):
        chat.answering()
        length = len(page.locator("#live").inner_text())
        page.wait_for_function(
            "n => document.querySelector('#live').innerText.length > n + 40", arg=length
        )
    expect(first.locator("body.ps-live")).to_have_count(1)
    assert first.evaluate("location.hash") != second.evaluate("location.hash")
    one.stop()
    expect(second.locator("body.ps-live")).to_have_count(1)
    two.stop()


@pytest.mark.parametrize("mode", ["dark", "light"])
@pytest.mark.parametrize("width", [400, 1440])
def test_nothing_sticks_out(chromium: Browser, visit: Visit, width: int, mode: Any) -> None:
    profile = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=mode, reduced_motion="reduce"
    )
    page = visit(profile=profile)
    assert page.evaluate("document.body.classList.contains('dark')") is (mode == "dark")
    Chat(page).ask("Does it fit?")
    if width < 1100:
        page.get_by_role("button", name="Live panel", exact=True).click()
        page.wait_for_function(
            "document.querySelector('#right').getBoundingClientRect().right <= innerWidth + 1"
        )
    expect(block(page)).to_have_attribute("data-state", "working")
    assert page.evaluate(SIDEWAYS) == 0
    assert page.evaluate(STICKING_OUT) == []
    track = page.evaluate(
        "getComputedStyle(document.querySelector('.ps-ahead .ps-switch i')).backgroundColor"
    )
    ground = page.evaluate("getComputedStyle(document.querySelector('#right')).backgroundColor")
    assert track != ground
    profile.close()
