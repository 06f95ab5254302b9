"""Text from a model, a title, an error or a file name never acts: nothing runs, nothing leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from app.history import History
from tests.browser.chat import Chat
from tests.browser.conftest import RunningApp, Watched, app_process, enter
from tests.browser.payloads import EVIL, PAYLOADS

ECHO = "tests.browser.echo_engine:EchoEngine"
ACTIVE = """() => {
  const tags = 'script,img,iframe,object,embed,video,audio,source,link,style,meta,base,form,'
    + 'input,textarea,details,marquee,frame,foreignObject,image,use,animate';
  const found = [];
  for (const part of document.querySelectorAll('.message-content, .thought-group, #clist li')) {
    for (const e of part.querySelectorAll(tags)) found.push(e.outerHTML.slice(0, 100));
    for (const e of part.querySelectorAll('*')) {
      for (const a of e.attributes) {
        if (a.name.startsWith('on')) found.push(a.name + '=' + a.value);
        if (/^(href|src|action|xlink:href|formaction)$/.test(a.name)
            && !/^(https?:|mailto:|#|[/])/i.test(a.value)) found.push(a.name + '=' + a.value);
        if (a.name === 'style' && /url[(]|fixed/i.test(a.value)) found.push(a.value);
      }
    }
  }
  if (document.querySelectorAll('.ps-foot').length
      > document.querySelectorAll('#chat .bot-row').length) found.push('forged figures');
  return found;
}"""


@pytest.fixture
def hostile_app(tmp_path: Path) -> Iterator[RunningApp]:
    """An app whose chats, titles, errors and model folder names were written by an enemy."""
    history = History(tmp_path / "chats")
    everything = history.create()
    history.rename(everything, "Everything at once")
    for payload in PAYLOADS:
        _, answer = history.ask(everything, payload)
        history.save_answer(answer, payload, payload, "failed", {}, payload)
        titled = history.create()
        history.rename(titled, payload.replace("\n", " ")[:180])
    history.close()
    folder = tmp_path / "models"
    named = folder / "<img src=x onerror=window.__pwned=1>"
    named.mkdir(parents=True)
    (named / "config.json").write_text(json.dumps({"num_local_experts": 8}))
    settings = {"version": 1, "model_folders": [str(folder)]}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with app_process(ECHO, tmp_path) as running:
        yield running


def quiet(page: Page, rules: Watched) -> None:
    """Give what might act a moment, then look."""
    page.evaluate("() => new Promise(done => setTimeout(done, 300))")
    assert page.evaluate("window.__pwned") is None
    assert page.evaluate(ACTIVE) == []
    assert page.url.startswith(rules.origin)
    rules.check()


def test_nothing_acts_and_nothing_leaves(hostile_app: RunningApp, context: BrowserContext) -> None:
    rules = Watched(hostile_app.origin)
    page = context.new_page()
    rules.watch(page)
    enter(page, hostile_app)
    chat = Chat(page)
    expect(chat.titles).to_have_count(len(PAYLOADS) + 1)
    quiet(page, rules)

    chat.row("Everything at once").locator(".go").click()
    expect(chat.questions).to_have_count(30)
    expect(page.locator("#earlier button")).to_be_visible()
    page.locator("#earlier button").click()
    expect(chat.questions).to_have_count(len(PAYLOADS))
    for arrow in page.locator("#chat .thought-group .title").all()[:6]:
        arrow.click()
    quiet(page, rules)

    page.locator("#new").click()
    expect(chat.questions).to_have_count(0)
    chat.send("\n\n".join(PAYLOADS))
    chat.settled()
    expect(chat.answers).to_have_count(1)
    quiet(page, rules)
    shown = chat.answers.last.inner_text()
    assert "<script>window.__pwned=1</script>" in shown.replace("\u2060", "")

    chat.act("Copy message")
    page.wait_for_function("navigator.clipboard.readText().then(t => t.includes('__pwned'))")
    assert "\u2060" not in page.evaluate("navigator.clipboard.readText()")

    chat.send("!fail " + " ".join(PAYLOADS))
    chat.settled()
    expect(page.locator("#chat .ps-failed")).to_have_count(1)
    quiet(page, rules)

    page.locator("#model input").click()
    expect(page.get_by_role("option").filter(has_text="onerror")).to_have_count(1)
    page.get_by_role("option").filter(has_text="onerror").click()
    page.locator("#load").click()
    expect(page.locator(".ps-note")).to_contain_text("onerror")
    page.locator("#search textarea, #search input").fill(PAYLOADS[1])
    expect(chat.titles.first).to_be_visible()
    quiet(page, rules)

    page.goto(f"{hostile_app.origin}/#c={quote(PAYLOADS[1])}")
    page.reload()
    expect(chat.box).to_be_visible()
    quiet(page, rules)
    assert EVIL not in page.evaluate(
        "performance.getEntriesByType('resource').map(e => e.name).join()"
    )
