"""Whether copying ahead pays on this machine: measured in live paired trials, not believed.

Short blocks of tokens with and without, one after another, several pairs of them; the paired
differences decide. After a trial the choice stands for a while, then it is tried anew, ever more
rarely. Pure: it is told the time at every pass.
"""

from __future__ import annotations

import math

from runtime.core import Verdict

FIRST_AFTER_PASSES = 64
BLOCK_PASSES = 8
SETTLE_PASSES = 2
PAIRS = 4
REST_PASSES = 512
LONGEST_REST_PASSES = 8192
FULL, CAREFUL, OFF = 2, 1, 0
"""Layers to copy ahead for."""


class Controller:
    """Owns the choice how far to copy ahead. Only decode passes count; a prompt, or a change in
    how many sequences run, starts the block anew."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self._wait_passes = FIRST_AFTER_PASSES
        self._rest_passes = REST_PASSES
        self._trial: _Trial | None = None
        self._last: tuple[float, int] | None = None

    @property
    def look_ahead(self) -> int:
        """How many layers to copy ahead for in the pass that begins."""
        if self._trial is not None:
            return FULL if self._trial.on else OFF
        return self.verdict.look_ahead

    def begin_pass(self, now_s: float, tokens: int, prompt: bool) -> int:
        """Note that a pass of `tokens` rows begins; return how many layers to copy ahead for."""
        last, self._last = self._last, (None if prompt else (now_s, tokens))
        if prompt or last is None or last[1] != tokens:
            if self._trial is not None:
                self._trial.restart_block()
            return self.look_ahead
        if self._trial is None:
            self._wait_passes -= 1
            if self._wait_passes <= 0:
                self._trial = _Trial()
        elif self._trial.add((now_s - last[0]) / tokens):
            self.verdict = self._trial.verdict()
            self._trial = None
            self._wait_passes = self._rest_passes
            self._rest_passes = min(2 * self._rest_passes, LONGEST_REST_PASSES)
        return self.look_ahead


class _Trial:
    """Blocks in the order on, off, off, on, on, off, off, on: drift cancels within two pairs."""

    def __init__(self) -> None:
        self._seconds: list[list[float]] = [[]]

    @property
    def on(self) -> bool:
        return _on(len(self._seconds) - 1)

    def restart_block(self) -> None:
        self._seconds[-1].clear()

    def add(self, seconds: float) -> bool:
        """Note a token's seconds; return True when the trial is complete."""
        self._seconds[-1].append(seconds)
        if len(self._seconds[-1]) < SETTLE_PASSES + BLOCK_PASSES:
            return False
        if len(self._seconds) == 2 * PAIRS:
            return True
        self._seconds.append([])
        return False

    def verdict(self) -> Verdict:
        """Compare the pairs: a difference of two standard errors counts."""
        means = [sum(block[SETTLE_PASSES:]) / BLOCK_PASSES for block in self._seconds]
        on_first = [_on(number) for number in range(len(means))]
        saved = []
        for pair in range(PAIRS):
            first, second = means[2 * pair], means[2 * pair + 1]
            saved.append(second - first if on_first[2 * pair] else first - second)
        mean = sum(saved) / PAIRS
        spread = math.sqrt(sum((each - mean) ** 2 for each in saved) / (PAIRS - 1))
        error = spread / math.sqrt(PAIRS)
        with_s = sum(m for m, on in zip(means, on_first, strict=True) if on) / PAIRS
        without_s = sum(m for m, on in zip(means, on_first, strict=True) if not on) / PAIRS
        look_ahead = FULL if mean > 2 * error else OFF if mean < -2 * error else CAREFUL
        return Verdict(look_ahead, 1.0 / without_s, 1.0 / with_s)


def _on(block: int) -> bool:
    return block % 4 in (0, 3)
