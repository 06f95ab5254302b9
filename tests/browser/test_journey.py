"""What a person does on a first evening, in one go; and nothing is lost on the way."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.chat import Chat
from tests.browser.conftest import RunningApp, Visit, ready


def clipboard(page: Page) -> str:
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def test_a_person_chats_and_keeps_order(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    expect(page.get_by_role("heading", name="Ask, and watch the experts work")).to_be_visible()
    examples = page.locator("[data-ask]")
    assert examples.count() == 4
    text = examples.nth(2).inner_text()
    examples.nth(2).click()
    expect(chat.questions).to_have_text([text])
    chat.settled()
    page.locator("#new").click()
    expect(chat.questions).to_have_count(0)

    answer = chat.ask("First question !think !code")
    expect(answer).to_contain_text("hidden = layer(hidden)")
    expect(chat.feet.last).to_contain_text("tokens/s")
    expect(chat.feet.last).to_contain_text("emulated")
    expect(page.locator("#chat .thought-group")).to_have_count(1)
    expect(page.locator("#chat .thought-group")).not_to_contain_text("The person asks")
    assert "#c=" in page.url

    chat.send("Second question !long")
    expect(chat.answering()).to_contain_text("experts")
    chat.stop()
    expect(chat.feet.last).to_contain_text("Stopped")
    part = chat.answers.last.inner_text()
    assert part.startswith("Only a few experts")

    chat.act("Retry")
    expect(page.locator("body.ps-live")).to_have_count(1)
    chat.stop()
    expect(chat.feet).to_have_count(2)
    expect(chat.questions).to_have_count(2)

    chat.act("Edit")
    editor = page.locator("#chat textarea")
    editor.fill("Second question, shorter")
    page.locator("#chat").get_by_label("Submit").click()
    expect(chat.questions.last).to_contain_text("shorter")
    chat.settled()
    expect(chat.answers.last).to_contain_text("Nothing is guessed.")

    chat.act("Copy message")
    page.wait_for_function("navigator.clipboard.readText().then(t => t.includes('guessed'))")
    copied = clipboard(page)
    assert copied.startswith("Only a few **experts**")
    assert "tokens/s" not in copied
    assert "<" not in copied


def test_chats_are_renamed_found_and_deleted(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    chat.ask("Quokka habits?")
    page.locator("#new").click()
    expect(chat.questions).to_have_count(0)
    chat.ask("Periscope optics?")
    page.go_back()
    expect(chat.questions).to_have_text(["Quokka habits?"])
    page.go_forward()
    expect(chat.questions).to_have_text(["Periscope optics?"])
    page.locator("#new").click()
    expect(chat.questions).to_have_count(0)

    row = chat.row("Quokka habits?")
    row.hover()
    row.get_by_label("Rename Quokka habits?").click()
    page.get_by_label("New title").fill("Small kangaroos")
    page.keyboard.press("Enter")
    expect(chat.row("Small kangaroos")).to_have_count(1)

    search = page.locator("#search textarea, #search input")
    search.fill("kangaroos")
    expect(chat.titles).to_have_text(["Small kangaroos"])
    search.fill("no such words anywhere")
    expect(page.locator("#clist")).to_contain_text("No chat matches")
    search.fill("")
    expect(chat.row("Periscope optics?")).to_have_count(1)

    row = chat.row("Periscope optics?")
    row.locator(".go").click()
    expect(chat.questions).to_have_count(1)
    row.hover()
    row.locator(".del").click()
    expect(row).to_have_count(1)
    expect(row.locator(".del.arm")).to_be_visible()
    row.locator(".del").click()
    expect(row).to_have_count(0)
    expect(chat.questions).to_have_count(0)
    assert "#c=" not in page.url


def test_a_reload_in_mid_answer_loses_nothing(visit: Visit, app: RunningApp) -> None:
    page = visit()
    chat = Chat(page)
    chat.send("Tell me everything !long")
    before = chat.answering().inner_text()
    page.reload()
    ready(page)
    expect(chat.questions).to_have_count(1)
    again = chat.answering()
    expect(again).to_contain_text(before.split("\n")[0])
    length = len(again.inner_text())
    page.wait_for_function(
        "n => document.querySelector('#live').innerText.length > n + 40", arg=length
    )
    chat.stop()
    expect(chat.feet.last).to_contain_text("Stopped")
    page.goto("about:blank")
    page.goto(f"{app.origin}/")
    ready(page)
    chat.row("Tell me everything").first.locator(".go").click()
    expect(chat.answers.last).to_contain_text("Only a few experts")
