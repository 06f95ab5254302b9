"""What an eviction rule is: it says which resident expert leaves when a slot is needed.

Pure bookkeeping over one global pool of slots. Time `now` is counted in tokens and never goes
back. A rule hears of every use, also of experts that hold no slot, so that what comes in can be
weighed against what would have to go (`worth`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.core import ExpertId

Experts = NDArray[np.int64]
Floats = NDArray[np.float64]


class Eviction(Protocol):
    """Decides which resident expert leaves. Time `now` is in tokens and never goes back."""

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        """Note that `expert` was routed, resident or not; `weight` is 1 in decode."""

    def used_all(
        self, layer: int, experts: Experts, now: float, weights: Floats | None = None
    ) -> None:
        """Note that these experts of a layer were routed; `weights` None stands for all ones."""
        each = [1.0] * len(experts) if weights is None else weights.tolist()
        for number, weight in zip(experts.tolist(), each, strict=True):
            self.used(ExpertId(layer, number), now, weight)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        """Note that `expert` got a slot; a prefetched one is on probation until it is used."""

    def removed(self, expert: ExpertId) -> None:
        """Note that `expert` left its slot."""

    def fixed(self, expert: ExpertId) -> None:
        """Hear that an expert, resident or about to be, will not be let go until `loosed`: it is
        pinned, or still on its way. A rule may make use of that."""
        return

    def loosed(self, expert: ExpertId) -> None:
        """Hear that a resident may be let go again."""
        return

    def fixed_all(self, layer: int, experts: Sequence[int]) -> None:
        """Hear of these residents of a layer what `fixed` says of one."""
        for number in experts:
            self.fixed(ExpertId(layer, number))

    def loosed_all(self, layer: int, experts: Sequence[int]) -> None:
        """Hear of these residents of a layer what `loosed` says of one."""
        for number in experts:
            self.loosed(ExpertId(layer, number))

    def spare(self, layer: int, experts: Sequence[int] | Experts) -> None:
        """Hear whom of a layer to let go only when nobody else may; this replaces what was said
        of the layer before. A rule may make use of that: `may_go` says the same, one by one."""
        return

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        """Return whom to evict while MoE layer `layer` is served, or None; remove nobody.

        Only residents for which `may_go` is true are considered: pinned and loading experts must
        stay, and so must prefetched ones whose layer is still to come.
        """

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return how much `expert` is worth a slot, resident or not: larger is worth more.

        Comparable between experts at one moment, not between rules or moments.
        """
