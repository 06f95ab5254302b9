"""Which of two predictions to trust, by how each would have done on live tokens. Pure figures."""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 0.01
"""A learned head must recall this much more than router reuse to replace it."""

MIN_TOKENS = 32.0
"""Tokens of evidence before anything is decided; what a file claims counts for as many."""

_MEMORY_TOKENS = 512.0


@dataclass
class Running:
    """An exponential average of recall at the deployed budget, over about 512 tokens.

    `tokens` is the evidence behind it, at most that many.
    """

    recall: float = 0.0
    tokens: float = 0.0

    def add(self, recall: float, tokens: int) -> None:
        """Take in the mean `recall` of so many more tokens."""
        if tokens <= 0:
            return
        weight = tokens / min(self.tokens + tokens, max(_MEMORY_TOKENS, float(tokens)))
        self.recall += (recall - self.recall) * min(1.0, weight)
        self.tokens = min(self.tokens + tokens, _MEMORY_TOKENS)


@dataclass
class Shadow:
    """One (layer, distance): both recalls, and which prediction is in use.

    `learned_on` starts False; a learned head is never used before there is evidence for it.
    """

    reuse: Running
    learned: Running
    learned_on: bool = False

    @property
    def in_use(self) -> Running:
        return self.learned if self.learned_on else self.reuse

    def decide(self, has_reuse: bool, has_learned: bool) -> None:
        """Switch to the better one, if it is better by the margin and there is evidence."""
        if not has_learned:
            self.learned_on = False
        elif self.learned.tokens < MIN_TOKENS:
            self.learned_on = False
        elif not has_reuse:
            # Against nothing, whatever is better than chance is worth having.
            self.learned_on = self.learned.recall > 0.0
        elif self.learned_on:
            self.learned_on = self.learned.recall >= self.reuse.recall
        else:
            self.learned_on = self.learned.recall > self.reuse.recall + MARGIN
