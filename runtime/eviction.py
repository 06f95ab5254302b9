"""Eviction rules: which resident expert leaves when a slot is needed.

Pure bookkeeping over one global pool of slots. Time `now` is counted in tokens and never goes
back. A rule hears of every use, also of experts that hold no slot, so that what comes in can be
weighed against what would have to go (`worth`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from runtime.core import ExpertId
from runtime.errors import ConfigError
from runtime.eviction_frequency import DecayedFrequency
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_s3_fifo import S3Fifo

__all__ = [
    "EVICTIONS",
    "DecayedFrequency",
    "Eviction",
    "ExpectedNextUse",
    "Lru",
    "S3Fifo",
    "make_eviction",
]


class Eviction(Protocol):
    """Decides which resident expert leaves. Time `now` is in tokens and never goes back."""

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        """Note that `expert` was routed, resident or not; `weight` is 1 in decode."""

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        """Note that `expert` got a slot; a prefetched one is on probation until it is used."""

    def removed(self, expert: ExpertId) -> None:
        """Note that `expert` left its slot."""

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        """Return whom to evict while MoE layer `layer` is served, or None; remove nobody.

        Only residents for which `may_go` is true are considered: pinned and loading experts must
        stay, and so must prefetched ones whose layer is still to come.
        """

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return how much `expert` is worth a slot, resident or not: larger is worth more.

        Comparable between experts at one moment, not between rules or moments.
        """


class Lru:
    """Least recently used first, over all layers; a slot given counts as a use."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertId, None] = OrderedDict()
        self._last: dict[ExpertId, int] = {}
        self._uses = 0

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        self._touch(expert)
        if expert in self._order:
            self._order.move_to_end(expert)

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


EVICTIONS: dict[str, Callable[[int], Eviction]] = {
    "lru": lambda layers: Lru(),
    "decayed-frequency": lambda layers: DecayedFrequency(),
    "s3-fifo": lambda layers: S3Fifo(),
    "expected-next-use": ExpectedNextUse,
}


def make_eviction(name: str, layers: int) -> Eviction:
    """Return a fresh eviction rule for a model with `layers` MoE layers.

    Raises:
        ConfigError: there is no rule of that name.
    """
    if name not in EVICTIONS:
        raise ConfigError(
            f"There is no eviction rule '{name}'.", f"Choose one of {', '.join(EVICTIONS)}."
        )
    return EVICTIONS[name](layers)
