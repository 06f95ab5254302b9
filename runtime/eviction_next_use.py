"""PreScope's own eviction: the resident expert whose next use is expected latest has to go.

Belady's rule (1966) with an estimate in the place of the future. Layers come round in a fixed
order, so an expert of layer t cannot be used before its layer's turn, which is
((t - layer - 1) mod L) / L passes away; and it is chosen there with probability r per pass, so
1/r - 1 further passes are expected to go by. In decode, where r is small, this is decayed
frequency that knows the order of the layers. With large batches, where every expert is used in
every pass, it evicts what was used a moment ago and so keeps a constant share of the experts,
where rules that look only backwards evict each expert just before its turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled
from runtime.core import ExpertId
from runtime.eviction import Eviction, Experts, Floats
from runtime.use_counts import HALF_LIVES_TOKENS, SHARES, UseCounts

Flags = NDArray[np.bool_]
Reasons = NDArray[np.int8]

RAREST = 2.0**-60
FIXED, SPARED = 1, 2
"""Why a resident stays: it must, or others go first. To be combined."""


class ExpectedNextUse(Eviction):
    """Latest expected next use first; an unused prefetch whose layer has passed before all.

    r is a mixture of use rates over several scales at the end of the layer's last turn. Between a
    layer's turns its r stay as they are, so each layer's first to go is looked for only when the
    layer had its turn or its residents changed, and a victim is the first of one of the L layers.
    A layer with more than its share of slots gives up first, by the square root of how much more:
    its time grows faster than its misses, so misses spread over the layers cost less than the
    same number in a few.
    """

    def __init__(
        self,
        experts: Sequence[int],
        half_lives_tokens: Sequence[float] = HALF_LIVES_TOKENS,
        shares: Sequence[float] = SHARES,
    ) -> None:
        self.counts = UseCounts(experts, half_lives_tokens, shares)
        layers, most = len(experts), max(experts)
        self._held = 0
        self._probation: dict[ExpertId, None] = {}
        turn = np.arange(layers)
        self._wait_passes = (turn[None, :] - turn[:, None] - 1) % layers / layers
        self._resident: Flags = np.zeros((layers, most), np.bool_)
        self._stays: Reasons = np.zeros((layers, most), np.int8)
        self._spared: set[int] = set()
        # By layer: its residents, who goes first, by when that one's next use is expected, whether
        # that has to be looked for anew, and what it counts for seen from the layer being served.
        self._residents = np.zeros(layers, np.int64)
        self._first = np.full(layers, -1, np.int64)
        self._passes = np.full(layers, -math.inf)
        self._changed: Flags = np.zeros(layers, np.bool_)
        self._costs = np.full(layers, -math.inf)

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        layer, number = expert
        self.used_all(layer, np.array([number]), now, np.array([weight]))

    def used_all(
        self, layer: int, experts: Experts, now: float, weights: Floats | None = None
    ) -> None:
        self.counts.used(layer, experts, now, weights)
        self._changed[layer] = True
        if self._probation:
            for number in experts.tolist():
                self._probation.pop(ExpertId(layer, number), None)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        layer, number = expert
        assert not self._resident[layer, number], f"{expert} has a slot already"
        self._resident[layer, number] = True
        self._residents[layer] += 1
        self._held += 1
        self._changed[layer] = True
        if prefetched:
            self._probation[expert] = None

    def removed(self, expert: ExpertId) -> None:
        layer, number = expert
        assert self._resident[layer, number], f"{expert} has no slot"
        self._resident[layer, number] = False
        self._stays[layer, number] &= ~FIXED
        self._residents[layer] -= 1
        self._held -= 1
        self._changed[layer] = True
        self._probation.pop(expert, None)

    def fixed(self, expert: ExpertId) -> None:
        self._stays[expert] |= FIXED
        self._changed[expert.layer] = True

    def loosed(self, expert: ExpertId) -> None:
        self._stays[expert] &= ~FIXED
        self._changed[expert.layer] = True

    def fixed_all(self, layer: int, experts: Sequence[int]) -> None:
        stays = self._stays[layer]
        for number in experts:
            stays[number] |= FIXED
        self._changed[layer] = True

    def loosed_all(self, layer: int, experts: Sequence[int]) -> None:
        stays = self._stays[layer]
        for number in experts:
            stays[number] &= ~FIXED
        self._changed[layer] = True

    def spare(self, layer: int, experts: Sequence[int] | Experts) -> None:
        stays = self._stays[layer]
        stays &= ~SPARED
        if len(experts):
            stays[experts] |= SPARED
            self._spared.add(layer)
        else:
            self._spared.discard(layer)
        self._changed[layer] = True

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        found = self._first_to_go(may_go, layer, SPARED | FIXED)
        if found is None and self._spared:
            self._changed[:] = True
            found = self._first_to_go(may_go, layer, FIXED)
            self._changed[:] = True
        return found

    def _first_to_go(
        self, may_go: Callable[[ExpertId], bool], layer: int, staying: int
    ) -> ExpertId | None:
        """Return whom to evict of those who do not stay for such a reason."""
        for expert in self._probation:
            if not self._stays[expert] & staying and may_go(expert):
                return expert
        return self._latest(may_go, layer, staying)

    def _latest(
        self, may_go: Callable[[ExpertId], bool], layer: int, staying: int
    ) -> ExpertId | None:
        """Return whose next use is expected latest, but for those who stay for such a reason."""
        rates, costs = self.counts.rates, self._costs
        turn = _look(
            rates,
            self._resident,
            self._stays,
            staying,
            self._residents,
            self._changed,
            self._first,
            self._passes,
            self._wait_passes[layer],
            costs,
            self._held,
        )
        while turn >= 0:
            number = int(self._first[turn])
            expert = ExpertId(turn, number)
            if may_go(expert):
                return expert
            # The next one of that layer, for this once.
            self._changed[turn] = True
            here, after = rates[turn], rates[turn, number]
            found = _next(here, self._resident[turn], self._stays[turn], staying, after, number)
            self._first[turn] = found
            if found < 0:
                costs[turn] = -math.inf
            else:
                waits = self._wait_passes[layer, turn]
                costs[turn] = (_passes(here[found]) + waits) * self._crowded(turn)
            turn = int(costs.argmax())
            if costs[turn] == -math.inf:
                break
        return None

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return minus the expected passes until the next use; minus infinity on probation."""
        if expert in self._probation:
            return -math.inf
        waits = self._wait_passes[layer, expert.layer]
        return float(1.0 - waits - _passes(self.counts.rates[expert]))

    def _crowded(self, layer: int) -> float:
        fair = max(1.0, self._held) / len(self._residents)
        return math.sqrt(max(self._residents[layer], 1) / fair)


@compiled
def _passes(rate: float) -> float:
    """Return the passes that are expected to go by until the next use, and one more."""
    return 1.0 / min(max(rate, RAREST), 1.0)


@compiled
def _next(
    rates: Floats, resident: Flags, stays: Reasons, staying: int, after: float, number: int
) -> int:
    """Return who of a layer goes first of those that come after one of that rate and number: the
    least used, then the lowest number; -1 if nobody does."""
    found = -1
    for each in range(len(rates)):
        if not resident[each] or stays[each] & staying:
            continue
        rate = rates[each]
        if rate < after or (rate == after and each <= number):
            continue
        if found < 0 or rate < rates[found]:
            found = each
    return found


@compiled
def _look(
    rates: Floats,
    resident: Flags,
    stays: Reasons,
    staying: int,
    residents: Experts,
    changed: Flags,
    first: Experts,
    passes: Floats,
    waits: Floats,
    costs: Floats,
    held: int,
) -> int:
    """Bring up to date who goes first in each layer and what that costs, seen from the layer that
    waits so long for each; return whose is the highest, -1 if nobody may go."""
    layers = len(residents)
    fair = max(1.0, held) / layers
    latest, most = -1, -np.inf
    for layer in range(layers):
        if changed[layer]:
            changed[layer] = False
            found = _next(rates[layer], resident[layer], stays[layer], staying, -1.0, -1)
            first[layer] = found
            passes[layer] = -np.inf if found < 0 else _passes(rates[layer, found])
        crowded = math.sqrt(max(residents[layer], 1) / fair)
        costs[layer] = (passes[layer] + waits[layer]) * crowded
        if costs[layer] > most:
            latest, most = layer, costs[layer]
    return latest
