from __future__ import annotations

import http.client
import io
import json
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

from assets.launcher.faults import ConsentFault, InstallFault
from assets.launcher.progress_page import KEY_HEADER, ProgressPage
from assets.launcher.report import Question, Report
from tests.launcher.tree import wait_until

QUESTION = Question("2.6 GB?", "Download", "Not now")


class Visitor:
    """One browser tab, or somebody pretending to be one."""

    def __init__(self, page: ProgressPage) -> None:
        parts = urllib.parse.urlsplit(page.url)
        self.port = parts.port
        self.key = urllib.parse.parse_qs(parts.query)["k"][0]

    def ask(
        self, method: str, path: str, key: str | None = None, host: str | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        headers = {KEY_HEADER: key} if key is not None else {}
        if host is not None:
            headers["Host"] = host
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.headers)
        finally:
            connection.close()


@pytest.fixture
def report() -> Report:
    return Report(io.StringIO(), None)


@pytest.fixture
def visitor(report: Report) -> Iterator[Visitor]:
    page = ProgressPage(report)
    page.start()
    report.page_is_open = True
    yield Visitor(page)
    page.stop()


@pytest.mark.parametrize("path", ["/", "/?k=anything", "/page.css", "/page.js", "/icon.svg"])
def test_the_page_and_its_parts_are_served(visitor: Visitor, path: str) -> None:
    status, body, headers = visitor.ask("GET", path)
    assert status == 200
    assert body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_name_is_turned_away(visitor: Visitor, method: str, host: str) -> None:
    for path in ("/", "/status", "/retry"):
        assert visitor.ask(method, path, visitor.key, host)[0] == 421


@pytest.mark.parametrize("key", [None, "", "guess", "ÿ"])
def test_without_the_key_nothing_is_told_and_nothing_done(
    visitor: Visitor, report: Report, key: str | None
) -> None:
    report.ready("http://127.0.0.1:1/?t=secret")
    assert visitor.ask("GET", "/status", key)[0] == 404
    assert visitor.ask("POST", "/retry", key)[0] == 403


def test_the_status_tells_the_step_and_then_the_address(visitor: Visitor, report: Report) -> None:
    report.step("Downloading", 0.2, 0.6)
    report.progress(50, 100, "50 of 100 MB")
    state = json.loads(visitor.ask("GET", "/status", visitor.key)[1])
    assert (state["title"], state["fraction"]) == ("Downloading", 0.4)
    assert state["detail"] == "50 of 100 MB"
    assert state["url"] is None
    report.ready("http://127.0.0.1:1/?t=secret")
    state = json.loads(visitor.ask("GET", "/status", visitor.key)[1])
    assert state["url"] == "http://127.0.0.1:1/?t=secret"


@pytest.mark.parametrize(("button", "agreed"), [("/agree", True), ("/decline", False)])
def test_the_page_answers_the_question(
    visitor: Visitor, report: Report, button: str, agreed: bool
) -> None:
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(report.ask(QUESTION)))
    asking.start()
    wait_until(lambda: report.snapshot()["question"] is not None, "the question")
    assert report.snapshot()["question"]["text"] == "2.6 GB?"
    assert visitor.ask("POST", button, visitor.key)[0] == 200
    asking.join(5)
    assert answers == [agreed]
    assert report.snapshot()["question"] is None


def test_nobody_to_ask_means_no(report: Report) -> None:
    with pytest.raises(ConsentFault, match=r"2\.6 GB") as caught:
        report.ask(QUESTION)
    assert "--yes" in caught.value.next_step
    assert Report(None, None, assume_yes=True).ask(QUESTION)


def test_retry_is_heard_only_after_a_failure(visitor: Visitor, report: Report) -> None:
    visitor.ask("POST", "/retry", visitor.key)
    report.fail(InstallFault("no wheel", "another Python"))
    waiting = threading.Thread(target=report.wait_for_retry, daemon=True)
    waiting.start()
    state = json.loads(visitor.ask("GET", "/status", visitor.key)[1])
    assert state["fault"] == {"what": "no wheel", "next_step": "another Python"}
    assert waiting.is_alive()
    visitor.ask("POST", "/retry", visitor.key)
    waiting.join(5)
    assert not waiting.is_alive()
    assert report.snapshot()["fault"] is None
