"""What the launcher is doing, said once: the console, the log and the progress page all read it."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from assets.launcher.faults import ConsentFault, Fault, Stopped
from assets.launcher.places import quietly

LINES_KEPT = 80
LOG_ROTATES_AT_BYTES = 1_000_000
CONSOLE_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class Question:
    """Something only the person can decide, with the words for both answers."""

    text: str
    yes: str
    no: str


class Report:
    """Owned by the working thread, which calls `step`, `line`, `progress`, `fail` and `ask`.

    Every other thread may call `snapshot`, `answer` and `stop`. Steps have weights so that the bar
    moves evenly: `step("Downloading", 0.2, 0.7)` says this step takes the bar from 20 % to 70 %.
    """

    def __init__(self, console: TextIO | None, log: Path | None, assume_yes: bool = False) -> None:
        self._console = console
        self._assume_yes = assume_yes
        self._changed = threading.Condition()
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._title = "Starting"
        self._detail = ""
        self._from, self._to, self._at = 0.0, 0.05, 0.0
        self._question: Question | None = None
        self._answer: bool | None = None
        self._fault: Fault | None = None
        self._url: str | None = None
        self._retry = False
        self._stopped = False
        self._console_progress_at = 0.0
        self.page_is_open = False
        self._log = _opened_log(log) if log else None

    def step(self, title: str, start: float, end: float) -> None:
        with self._changed:
            self._title, self._detail, self._fault = title, "", None
            self._from, self._to, self._at = start, end, start
        self.line(f"* {title}")

    def line(self, text: str) -> None:
        stamped = time.strftime("%H:%M:%S ") + text
        with self._changed:
            self._lines.append(stamped)
        self._to_log(stamped)
        self._to_console(text)

    def progress(self, done: float, total: float, detail: str) -> None:
        """Moves the bar within the step; the console hears of it now and then."""
        share = min(1.0, done / total) if total > 0 else 0.0
        with self._changed:
            self._at = self._from + (self._to - self._from) * share
            self._detail = detail
        if time.monotonic() - self._console_progress_at > CONSOLE_PROGRESS_EVERY_S:
            self._console_progress_at = time.monotonic()
            self._to_console(f"  {detail}")

    def log_only(self, text: str) -> None:
        """For the page's details and the log file, too chatty for the console."""
        stamped = time.strftime("%H:%M:%S ") + text
        with self._changed:
            self._lines.append(stamped)
        self._to_log(stamped)

    def console(self, text: str) -> None:
        """For the person at the console, and nowhere kept."""
        self._to_console(text)

    def ready(self, url: str) -> None:
        with self._changed:
            self._url, self._at, self._title, self._detail = url, 1.0, "Ready", ""

    def fail(self, fault: Fault) -> None:
        with self._changed:
            self._fault, self._retry = fault, False
        self.line(f"Failed: {fault}")
        self.line(f"What to do: {fault.next_step}")

    def wait_for_retry(self) -> None:
        """Blocks until the page's Retry button; `Stopped` if the launcher is closed instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._retry or self._stopped)
            if self._stopped:
                raise Stopped
            self._fault, self._retry = None, False

    def ask(self, question: Question) -> bool:
        """The person's answer, from the page, the console or --yes; whichever comes first."""
        self.line(question.text)
        if self._assume_yes:
            self.line("Agreed to with --yes.")
            return True
        at_console = self._console is not None and sys.stdin is not None and sys.stdin.isatty()
        if not (at_console or self.page_is_open):
            raise ConsentFault(question.text, "Run again with --yes to agree.")
        with self._changed:
            self._question, self._answer = question, None
        if at_console:
            threading.Thread(target=self._ask_console, args=(question,), daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None or self._stopped)
            self._question = None
            if self._stopped:
                raise Stopped
            return bool(self._answer)

    def _ask_console(self, question: Question) -> None:
        self._to_console(f"[y] {question.yes}   [n] {question.no}")
        reply = sys.stdin.readline().strip().lower()
        if reply:
            self.answer(reply in ("y", "yes"))

    def answer(self, agreed: bool) -> None:
        with self._changed:
            if self._question is not None and self._answer is None:
                self._answer = agreed
            self._changed.notify_all()

    def retry(self) -> None:
        with self._changed:
            self._retry = self._fault is not None
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def check_stopped(self) -> None:
        if self._stopped:
            raise Stopped

    def close(self) -> None:
        """Ends the log; the console is not ours to close."""
        if self._log is not None:
            self._log.close()

    def snapshot(self) -> dict[str, Any]:
        """What the page shows. Holds the app's token once ready: serve it to its page only."""
        with self._changed:
            question, fault = self._question, self._fault
            return {
                "title": self._title,
                "detail": self._detail,
                "fraction": round(self._at, 4),
                "lines": list(self._lines),
                "question": vars(question) if question else None,
                "fault": {"what": str(fault), "next_step": fault.next_step} if fault else None,
                "log": str(self._log.name) if self._log else "",
                "url": self._url,
            }

    def _to_console(self, text: str) -> None:
        if self._console is not None:
            console = self._console
            _survive_closed(lambda: print(text, file=console, flush=True))

    def _to_log(self, text: str) -> None:
        if self._log is not None:
            log = self._log
            _survive_closed(lambda: log.write(text + "\n"))


def _survive_closed(write: Callable[[], object]) -> None:
    """A console that was closed, or a full disk, must not stop the launcher from reporting."""
    try:
        write()
    except (OSError, ValueError, UnicodeError):
        return


def _opened_log(path: Path) -> TextIO | None:
    """One log file, and the one before it."""
    try:
        if path.exists() and path.stat().st_size > LOG_ROTATES_AT_BYTES:
            previous = path.with_suffix(".1.log")
            quietly(lambda: path.replace(previous))
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError:
        return None
