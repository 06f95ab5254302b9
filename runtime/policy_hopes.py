"""How much of what copies ahead were to save came true. Pure."""

from __future__ import annotations

from runtime.core import ExpertId
from runtime.policy import Moment, Routed

BELIEVED = 4.0
FORGET_AT = 100.0


class Hopes:
    """Compares what copies ahead were to save with what they did, least squares through the origin.

    A copy that landed saved its miss whole, one that was on the way the part that had come. With
    `check` off all hopes are believed.
    """

    def __init__(self, check: bool = True) -> None:
        self._check = check
        self._open: dict[int, dict[int, float]] = {}
        self._matched = self._squared = BELIEVED

    @property
    def kept(self) -> float:
        """The share of a hope that comes true."""
        return min(1.0, self._matched / self._squared) if self._check else 1.0

    def hope(self, expert: ExpertId, uses: float) -> None:
        """Note a copy ahead that is to save so many uses."""
        self._open.setdefault(expert.layer, {})[expert.expert] = uses

    def routed(self, routed: Routed, moment: Moment, size: int) -> None:
        """Hold the hopes for a layer against what came of them."""
        hopes = self._open.pop(routed.layer, None)
        if not hopes:
            return
        came = dict.fromkeys(routed.hits, 1.0)
        for number in routed.coming:
            left = moment.queue.left_bytes.get(ExpertId(routed.layer, number), 0)
            came[number] = 1.0 - left / size
        here = moment.here(routed.layer)
        for number, uses in hopes.items():
            # What was refused a slot, or lost it again, says nothing about copies.
            if number in here or number in came:
                self._matched += uses * came.get(number, 0.0)
                self._squared += uses * uses
        if self._squared > FORGET_AT:
            self._matched, self._squared = self._matched / 2, self._squared / 2
