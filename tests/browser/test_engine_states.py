"""Loading, failing, dying: the page says what happened, and nothing a person wrote is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.chat import Chat
from tests.browser.conftest import (
    FAKE_ENGINE,
    RunningApp,
    Visit,
    Watched,
    app_process,
    enter,
    write_models,
)


def choose(page: Page, name: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option").filter(has_text=name).click()


def test_a_model_loads_is_cancelled_and_fails_with_a_reason(visit: Visit) -> None:
    page = visit()
    strip = page.locator(".ps-load")
    expect(strip).to_be_hidden()

    choose(page, "tiny-moe")
    page.locator("#load").click()
    expect(strip).to_contain_text("Loading tiny-moe")
    expect(strip).to_contain_text("Reading experts")
    expect(strip.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", "0")
    expect(strip).to_be_hidden()

    choose(page, "endless-120b")
    page.locator("#load").click()
    expect(strip).to_contain_text("Loading endless-120b")
    expect(page.locator("#panel .ps-state")).to_contain_text("Loading")
    strip.get_by_role("button", name="Cancel").click()
    expect(strip).to_be_hidden()
    note = page.locator(".ps-note")
    expect(note).to_contain_text("cancelled")
    expect(note).to_contain_text("tiny-moe stays loaded")

    choose(page, "broken-8x7b")
    page.locator("#load").click()
    expect(note).to_contain_text("model.safetensors is cut short")
    expect(note).to_contain_text("Download it again.")
    expect(note).to_contain_text("tiny-moe stays loaded")
    expect(Chat(page).ask("Do you still answer?")).to_contain_text("experts")
    note.get_by_label("Dismiss").click()
    expect(note).to_have_count(0)

    choose(page, "dense-7b")
    page.locator("#load").click()
    expect(note).to_contain_text("Not a mixture of experts")
    expect(strip).to_be_hidden()


def test_an_engine_that_dies_keeps_the_text(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    chat.send("What happens now? !long !die")
    note = page.locator(".ps-note").filter(has_text="The engine stopped")
    expect(note).to_contain_text("Your text is kept.")
    expect(page.locator("#panel .ps-state")).to_contain_text("restarting")
    chat.settled()
    expect(chat.feet.last).to_contain_text("Retry to ask again")
    expect(chat.answers.last).to_contain_text("Only a few experts")
    expect(page.locator("body[data-engine=ready]")).to_have_count(1)
    chat.type("A draft that stays")
    chat.page.locator("#clist .go").first.click()
    expect(chat.box).to_have_value("A draft that stays")


def test_a_refused_question_says_why(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    chat.send("Too long? !refuse")
    chat.settled()
    expect(chat.feet.last).to_contain_text("the context holds 4,096")
    chat.box.fill("   ")
    chat.box.press("Enter")
    expect(chat.questions).to_have_count(1)


@pytest.fixture
def own_app(tmp_path: Path) -> Iterator[RunningApp]:
    write_models(tmp_path)
    with app_process(FAKE_ENGINE, tmp_path) as running:
        yield running


def test_settings_stay_and_a_lost_server_is_said(
    own_app: RunningApp, context: BrowserContext
) -> None:
    rules = Watched(own_app.origin, forgive=["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE", "live"])
    page = context.new_page()
    rules.watch(page)
    enter(page, own_app)
    page.get_by_role("button", name="Settings", exact=True).click()
    drawer = page.locator("#drawer")
    expect(drawer).to_be_visible()
    drawer.locator("#set-system textarea").fill("Answer in one line.")
    drawer.locator("#set-temperature input[type=number]").fill("0.7")
    drawer.locator("#set-temperature input[type=number]").blur()
    drawer.locator("#set-max_new_tokens input").fill("77")
    drawer.locator("#set-seed textarea, #set-seed input").fill("12")
    drawer.get_by_label("Hybrid").check()
    dark = page.evaluate("document.body.classList.contains('dark')")
    drawer.get_by_label("Light" if dark else "Dark").check()
    page.wait_for_function("was => document.body.classList.contains('dark') !== was", arg=dark)
    drawer.get_by_text("Emulated machine").click()
    drawer.locator("#set-link_bytes_per_s input").fill("80")
    drawer.locator("#set-seed textarea, #set-seed input").fill("twelve")
    expect(page.locator(".ps-note")).to_contain_text("seed")
    drawer.get_by_label("Close settings").click()
    expect(drawer).to_be_hidden()

    page.reload()
    expect(page.locator("#box textarea")).to_be_visible()
    assert page.evaluate("document.body.classList.contains('dark')") is not dark
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(drawer.locator("#set-system textarea")).to_have_value("Answer in one line.")
    expect(drawer.locator("#set-temperature input[type=number]")).to_have_value("0.7")
    expect(drawer.locator("#set-max_new_tokens input")).to_have_value("77")
    expect(drawer.locator("#set-seed textarea, #set-seed input")).to_have_value("12")
    expect(drawer.get_by_label("Hybrid")).to_be_checked()
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()

    own_app.process.terminate()
    lost = page.locator(".ps-note").filter(has_text="connection to PreScope was lost")
    expect(lost).to_be_visible()
    expect(page.locator("#panel .ps-panel.stale")).to_have_count(1)
    rules.check()
