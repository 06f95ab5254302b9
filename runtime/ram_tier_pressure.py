"""How many experts RAM should hold while other programs come and go.

Pure: readings go in, a number of experts comes out. Shrinking is at once and goes past the mark,
growing is slow and waits until there is clearly room, so that the two never chase each other.
"""

from __future__ import annotations

MIB = 2**20
LEAST_FREE_BYTES = 256 * MIB
LEAST_FREE_SHARE = 0.025
"""Of all RAM. Systems begin to swap somewhere below that; a plan leaves twice as much."""
GROW_AFTER_S = 20.0
GROW_SHARE = 0.05
"""Of the most there may be, at every step of growing."""


class RamPressure:
    """Decides from what the system says is available. The engine thread owns it.

    `most` and `least` are the numbers of experts that RAM may hold; `free_bytes` is what was
    available when the model had been loaded. Times only ever grow.
    """

    def __init__(
        self, total_bytes: int, free_bytes: int, expert_bytes: int, *, most: int, least: int
    ) -> None:
        wanted_bytes = max(LEAST_FREE_BYTES, int(total_bytes * LEAST_FREE_SHARE))
        # A machine that was full from the start is not a reason to give everything up.
        self.low_bytes = min(wanted_bytes, free_bytes // 2)
        self._expert_bytes = expert_bytes
        self._most = most
        self._least = min(least, most)
        self._calm_since_s: float | None = None

    @property
    def enough_bytes(self) -> int:
        """What is available after a shrink, and what has to stay so after growing."""
        return 2 * self.low_bytes

    def experts(self, now_s: float, free_bytes: int, held: int) -> int:
        """Return how many experts RAM should hold, given that it holds `held` now."""
        if free_bytes < self.low_bytes:
            self._calm_since_s = None
            lacking = -(-(self.enough_bytes - free_bytes) // self._expert_bytes)
            return max(min(self._least, held), held - lacking)
        spare = (free_bytes - self.enough_bytes) // self._expert_bytes
        if held >= self._most or spare <= 0:
            self._calm_since_s = None
            return held
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s < GROW_AFTER_S:
            return held
        self._calm_since_s = now_s
        step = max(1, int(self._most * GROW_SHARE))
        return min(self._most, held + min(step, spare))
