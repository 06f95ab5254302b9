"""How fast answers were written before and after prediction was switched. Pure, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

FULL_TOKENS = 128
"""A speed is taken over this many tokens; then the side after a switch is settled."""
LEAST_TOKENS = 16
SETTLE_S = 0.5
"""After a switch, what is in flight still belongs to the other side."""


@dataclass(frozen=True)
class Progress:
    """What all answers have come to: tokens so far, when the last one came (monotonic seconds),
    how many answers are under way, and how many were ever started."""

    tokens: int = 0
    last_token_s: float = 0.0
    answering: int = 0
    started: int = 0


@dataclass(frozen=True)
class Pair:
    """Tokens/s on both sides of one switch to `on`, with as many answers at once.

    `after` is None until enough tokens came, and final once `settled`.
    """

    on: bool
    before: float
    after: float | None = None
    settled: bool = False


class PaceMeter:
    """Follows the tokens of all answers and remembers the last switch. One thread.

    Only tokens that follow one another within the same answers count, timed from one to the next:
    a prompt that is being read, or a pause between two answers, is no part of either speed.
    """

    def __init__(self) -> None:
        self._subject: object = None
        self._on = True
        self._forget()

    @property
    def pair(self) -> Pair | None:
        """The last switch that had a speed before it."""
        return self._pair

    def sample(self, progress: Progress, on: bool, subject: object) -> None:
        """Take the progress now, with prediction `on` or not.

        `subject` is what is measured, such as model and policy: another one forgets everything.
        """
        if subject != self._subject:
            self._forget()
            self._subject = subject
        elif on is not self._on:
            self._switch(on, progress)
        self._on = on
        self._count(progress)
        self._last = progress

    def _forget(self) -> None:
        self._pair: Pair | None = None
        self._pair_answers = 0
        self._last = Progress()
        self._spans: deque[tuple[int, float]] = deque()
        self._answers = 0
        self._counts_from_s = 0.0
        self._following = False
        self._steady: dict[tuple[bool, int], float] = {}

    def _switch(self, on: bool, progress: Progress) -> None:
        before = self._steady.get((not on, self._answers))
        self._pair = None if before is None else Pair(on, before)
        self._pair_answers = self._answers
        self._spans.clear()
        self._counts_from_s = progress.last_token_s + SETTLE_S

    def _count(self, now: Progress) -> None:
        last = self._last
        if (now.answering, now.started) != (last.answering, last.started):
            self._following = False
            return
        if now.answering == 0 or now.tokens <= last.tokens:
            return
        if not self._following:
            self._following = True  # the first tokens of an answer only start the watch
            return
        if now.answering != self._answers:
            self._answers = now.answering
            self._spans.clear()
        if last.last_token_s < self._counts_from_s:
            return
        self._spans.append((now.tokens - last.tokens, now.last_token_s - last.last_token_s))
        tokens, seconds = (sum(part) for part in zip(*self._spans, strict=True))
        if tokens < LEAST_TOKENS or seconds <= 0:
            return
        tokens_per_s = tokens / seconds
        self._steady[self._on, self._answers] = tokens_per_s
        pair = self._pair
        if pair is not None and not pair.settled and self._pair_answers == self._answers:
            self._pair = replace(pair, after=tokens_per_s, settled=tokens >= FULL_TOKENS)
        while tokens - self._spans[0][0] >= FULL_TOKENS:
            tokens -= self._spans.popleft()[0]


def compared(before: float, after: float | None) -> tuple[str, str]:
    """Return "47.1 -> 51.9 tok/s" (with an arrow) and "+10 %"; both say so while one is open."""
    if after is None:
        return f"{_speed(before)} \N{RIGHTWARDS ARROW} \N{HORIZONTAL ELLIPSIS} tok/s", ""
    change = round(100 * (after / before - 1)) if before > 0 else 0
    sign = "+" if change > 0 else "\N{MINUS SIGN}" if change < 0 else "\N{PLUS-MINUS SIGN}"
    text = f"{_speed(before)} \N{RIGHTWARDS ARROW} {_speed(after)} tok/s"
    return text, f"{sign}{abs(change)} %"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.{0 if tokens_per_s >= 100 else 1 if tokens_per_s >= 10 else 2}f}"
