"""Precision of the experts, and the list of what quantising left on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import FAKE_ENGINE, RunningApp, Visit, app_process, write_models
from tests.browser.test_keyboard_and_small import SIDEWAYS
from tests.test_expert_file import make_header, opened, write

LONG = "somebody/An-Extremely-Long-Model-Name-30B-A3B-Instruct-2507-Final"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """An app of this file's own: which model was loaded last belongs to everybody who uses one."""
    data_dir = tmp_path_factory.mktemp("kept-app")
    write_models(data_dir)
    with app_process(FAKE_ENGINE, data_dir) as running:
        yield running


def settings(page: Page) -> Locator:
    page.get_by_role("button", name="Settings", exact=True).click()
    return page.locator("#drawer")


def test_the_precision_is_kept_and_the_list_deletes(
    app: RunningApp, visit: Visit, chromium: Browser
) -> None:
    folder: Path = app.data_dir / "experts"
    header = replace(make_header(), model="Tiny", kind="int4")
    write(folder / "a.int4.experts", header)
    write(folder / "b.int8.experts", replace(make_header(), model=LONG), 4)
    page = visit()
    drawer = settings(page)
    rows = drawer.locator("#set-kept li")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("Tinyint4 ·")
    expect(rows.nth(1)).to_contain_text("unfinished")

    in_use = opened(folder / "a.int4.experts", header)
    delete = rows.nth(0).get_by_role("button")
    delete.click()
    expect(delete).to_have_text("Sure?")
    assert (folder / "a.int4.experts").exists()
    delete.click()
    expect(drawer.locator("#set-kept .ps-said")).to_contain_text("in use")
    expect(rows).to_have_count(2)
    in_use.close()
    delete.click()
    delete.click()
    expect(rows).to_have_count(1)
    expect(drawer.locator("#set-kept .ps-said")).to_have_text("Deleted.")
    assert not (folder / "a.int4.experts").exists()

    choice = drawer.get_by_label("int4 A little over")
    choice.check()
    expect(choice).to_be_checked()
    page.wait_for_timeout(300)
    page.reload()
    drawer = settings(page)
    expect(drawer.get_by_label("int4 A little over")).to_be_checked()
    page.close()

    narrow = chromium.new_context(viewport={"width": 400, "height": 844}, reduced_motion="reduce")
    small = visit(profile=narrow)
    drawer = settings(small)
    expect(drawer.locator("#set-kept li")).to_have_count(1)
    box = drawer.locator("#set-kept").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400
    assert small.evaluate(SIDEWAYS) == 0
    small.get_by_label("Close settings").click()
    small.locator("#load").click()
    note = small.locator(".ps-note")
    expect(note).to_contain_text("The int4 experts are not kept: the disk is full.")
    expect(note).to_have_class("ps-note info")
    note.get_by_label("Dismiss").click()
    expect(note).to_have_count(0)
    drawer = settings(small)
    last = drawer.locator("#set-kept li").get_by_role("button")
    last.click()
    last.click()
    expect(drawer.locator("#set-kept")).to_contain_text("None yet")
    drawer.get_by_label("As stored").check()
    small.wait_for_timeout(300)
    small.get_by_label("Close settings").click()
    small.locator("#load").click()
    expect(small.locator(".ps-load")).to_be_visible()
    expect(small.locator(".ps-load")).to_be_hidden()
    expect(note).to_have_count(0)
    narrow.close()
