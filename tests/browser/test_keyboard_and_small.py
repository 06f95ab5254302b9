"""Hands off the mouse, and a phone's width."""

from __future__ import annotations

from playwright.sync_api import Browser, Page, expect

from tests.browser.chat import Chat
from tests.browser.conftest import Visit

SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
STICKING_OUT = """() => [...document.querySelectorAll('#center *, #top *')].filter(e => {
  const r = e.getBoundingClientRect();
  if (!r.width || r.right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p; p = p.parentElement) {
    const o = getComputedStyle(p).overflowX;
    if ((o === 'auto' || o === 'scroll' || o === 'hidden') && p.getBoundingClientRect().right
        <= innerWidth + 1) return false;
  }
  return true;
}).map(e => e.id + '.' + e.className).slice(0, 5)"""


def focused(page: Page) -> str:
    name: str = page.evaluate(
        "(e => e.id || e.getAttribute('aria-label') || e.className)(document.activeElement)"
    )
    return name


def test_everything_with_the_keyboard(visit: Visit) -> None:
    page = visit()
    chat = Chat(page)
    expect(chat.box).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another !long")
    page.keyboard.press("Enter")
    expect(chat.questions).to_have_count(1)
    expect(chat.questions.first).to_contain_text("and another")
    chat.answering()
    page.keyboard.press("Escape")
    chat.settled()
    expect(chat.feet.last).to_contain_text("Stopped")
    expect(chat.box).to_be_focused()

    page.keyboard.press("Control+k")
    expect(page.locator("#search textarea, #search input")).to_be_focused()
    page.keyboard.press("Escape")
    expect(chat.box).to_be_focused()

    row = page.locator("#clist .go").first
    row.focus()
    page.keyboard.press("F2")
    page.keyboard.type("Named by keys")
    page.keyboard.press("Enter")
    expect(chat.row("Named by keys")).to_have_count(1)
    expect(chat.row("Named by keys").locator(".go")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Delete")
    expect(chat.row("Named by keys").locator(".arm")).to_have_count(1)
    page.keyboard.press("Delete")
    expect(chat.row("Named by keys")).to_have_count(0)

    page.keyboard.press("Control+,")
    expect(page.locator("#drawer")).to_be_visible()
    expect(page.get_by_label("Close settings")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_be_hidden()

    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('#shell button, #shell input, #shell textarea')]
          .filter(e => e.offsetParent && !(e.getAttribute('aria-label') || e.innerText.trim()
            || e.labels?.length || e.title)).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []


def test_a_phone_s_width(chromium: Browser, visit: Visit) -> None:
    profile = chromium.new_context(
        viewport={"width": 400, "height": 844}, has_touch=True, reduced_motion="reduce"
    )
    page = visit(profile=profile)
    chat = Chat(page)
    assert page.evaluate(SIDEWAYS) == 0
    chat.ask("Narrow !code !math !table " + "unbreakable" * 12)
    assert page.evaluate(SIDEWAYS) == 0
    assert page.evaluate(STICKING_OUT) == []
    page.get_by_role("button", name="Chats", exact=True).click()
    expect(page.locator("#side")).to_be_visible()
    page.locator("#new").click()
    expect(page.locator("#side")).to_be_hidden()
    expect(chat.questions).to_have_count(0)
    page.get_by_role("button", name="Live panel", exact=True).click()
    expect(page.locator("#panel")).to_be_visible()
    assert page.evaluate(SIDEWAYS) == 0
    page.get_by_label("Close live panel").click()
    expect(page.locator("#panel")).to_be_hidden()
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.locator("#drawer")).to_be_visible()
    assert page.evaluate(SIDEWAYS) == 0
    profile.close()
