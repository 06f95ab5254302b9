"""The progress page as a person sees it, in a real browser."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.launcher.faults import NetworkFault
from assets.launcher.progress_page import ProgressPage
from assets.launcher.report import Question, Report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture
def page() -> Iterator[playwright.Page]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser.new_page()
        browser.close()


def test_from_progress_to_question_to_failure_to_the_app(
    page: playwright.Page, tmp_path: Path
) -> None:
    complaints: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requested.append(request.url))
    report = Report(io.StringIO(), tmp_path / "launcher.log")
    report.page_is_open = True
    served = ProgressPage(report)
    served.start()
    app = ProgressPage(Report(None, None))
    app.start()
    try:
        report.step("Downloading torch", 0.4, 0.8)
        report.progress(1, 2, "1,307 of 2,614 MB")
        page.goto(served.url)
        expect = playwright.expect
        expect(page.locator("#title")).to_have_text("Downloading torch")
        expect(page.locator("#detail")).to_have_text("1,307 of 2,614 MB")
        expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "60")
        expect(page.locator("#question")).to_be_hidden()

        answers: list[bool] = []
        question = Question("2.6 GB?", "Download 2.6 GB", "Use the CPU build instead")
        asking = threading.Thread(target=lambda: answers.append(report.ask(question)))
        asking.start()
        page.get_by_role("button", name="Download 2.6 GB").click()
        asking.join(10)
        assert answers == [True]
        expect(page.locator("#question")).to_be_hidden()

        report.fail(NetworkFault("The server is <b>away</b>.", "Check the cable."))
        expect(page.get_by_role("alert")).to_contain_text("The server is <b>away</b>.")
        expect(page.get_by_role("alert")).to_contain_text("Check the cable.")
        expect(page.locator("#log")).to_have_text(str(tmp_path / "launcher.log"))
        page.get_by_role("button", name="Retry").click()
        waiting = threading.Thread(target=report.wait_for_retry, daemon=True)
        waiting.start()
        waiting.join(10)
        assert not waiting.is_alive()
        expect(page.locator("#fault")).to_be_hidden()

        report.ready(app.url)
        page.wait_for_url(app.url)
        origins = {url.split("/")[2] for url in requested}
        assert origins == {served.url.split("/")[2], app.url.split("/")[2]}
        assert complaints == []
    finally:
        served.stop()
        app.stop()
        report.close()
