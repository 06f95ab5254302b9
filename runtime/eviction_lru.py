"""Least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from runtime.core import ExpertId
from runtime.eviction import Eviction, Experts, Floats


class Lru(Eviction):
    """Least recently used first, over all layers; a slot given counts as a use."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertId, None] = OrderedDict()
        self._last: dict[ExpertId, int] = {}
        self._uses = 0

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        self._touch(expert)
        if expert in self._order:
            self._order.move_to_end(expert)

    def used_all(
        self, layer: int, experts: Experts, now: float, weights: Floats | None = None
    ) -> None:
        order = self._order
        for number in experts.tolist():
            expert = ExpertId(layer, number)
            self._uses += 1
            self._last[expert] = self._uses
            if expert in order:
                order.move_to_end(expert)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        assert expert not in self._order, f"{expert} has a slot already"
        self._touch(expert)
        self._order[expert] = None

    def removed(self, expert: ExpertId) -> None:
        del self._order[expert]

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        return next(filter(may_go, self._order), None)

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        return float(self._last.get(expert, 0))

    def _touch(self, expert: ExpertId) -> None:
        self._uses += 1
        self._last[expert] = self._uses
