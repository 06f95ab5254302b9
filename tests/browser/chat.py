"""What a person does with the chat, as steps for the tests."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


class Chat:
    """The chat on one page; every step waits for what a person would wait for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.box = page.locator("#box textarea")

    def type(self, text: str) -> None:
        self.box.fill(text)

    def send(self, text: str) -> None:
        """Send and wait until the question stands in the chat."""
        before = self.questions.count()
        self.type(text)
        self.box.press("Enter")
        expect(self.questions).to_have_count(before + 1)

    def ask(self, text: str) -> Locator:
        """Send, wait for the whole answer, and return it."""
        self.send(text)
        self.settled()
        return self.answers.last

    def settled(self) -> None:
        """Wait until no answer is under way."""
        expect(self.page.locator("body:not(.ps-live)")).to_have_count(1)
        expect(self.page.locator("#live [data-testid=bot]")).to_have_count(0)

    def answering(self) -> Locator:
        """Wait until the answer under way shows text, and return it."""
        live = self.page.locator("#live [data-testid=bot]").last
        expect(live).to_be_visible()
        expect(live.locator(".ps-wait")).to_have_count(0)
        return live

    def stop(self) -> None:
        self.page.get_by_label("Stop", exact=True).click()
        self.settled()

    @property
    def questions(self) -> Locator:
        return self.page.locator("#chat [data-testid=user]")

    @property
    def answers(self) -> Locator:
        """The settled answers, without thinking and figures."""
        return self.page.locator("#chat [data-testid=bot]:not(:has(.ps-foot, .thought-group))")

    @property
    def feet(self) -> Locator:
        return self.page.locator("#chat .ps-foot")

    @property
    def titles(self) -> Locator:
        return self.page.locator("#clist .go")

    def row(self, title: str) -> Locator:
        return self.page.locator("#clist li").filter(has_text=title)

    def act(self, label: str, last: Locator | None = None) -> None:
        """Press one of the quiet buttons under a turn."""
        button = (last or self.page.locator("#chat")).get_by_label(label, exact=True).last
        button.focus()
        button.click()
