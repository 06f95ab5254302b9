"""How hot each expert is, for the panel's map: one byte per (layer, expert)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.core import ExpertId
from runtime.eviction_frequency import DecayedScores

HEAT_MAX = 127
RESIDENT_BIT = 0x80
HEAT_PER_USE = 24


class Heat:
    """Uses of experts, decayed by half in 16 tokens, whatever the policy goes by."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts = tuple(experts)
        self._scores = DecayedScores()

    def use(self, layer: int, experts: Iterable[int], token: float) -> None:
        for expert in experts:
            self._scores.use(ExpertId(layer, expert), token, 1.0)

    def picture(self, resident: Iterable[ExpertId], token: float) -> bytes:
        """Return one byte per (layer, expert): bit 7 in a slot, the rest how hot, 0 to 127."""
        width = max(self._experts)
        picture = bytearray(len(self._experts) * width)
        for layer, count in enumerate(self._experts):
            for expert in range(count):
                score = self._scores.score(ExpertId(layer, expert), token)
                picture[layer * width + expert] = min(HEAT_MAX, int(score * HEAT_PER_USE))
        for layer, expert in resident:
            picture[layer * width + expert] |= RESIDENT_BIT
        return bytes(picture)
