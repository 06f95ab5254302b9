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
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.use_counts import HALF_LIVES_TOKENS, SHARES, UseCounts

RAREST = 2.0**-60
FEW = 3
"""Up to so many residents find their places one by one; for more all are put in order anew."""


class ExpectedNextUse(Eviction):
    """Latest expected next use first; an unused prefetch whose layer has passed before all.

    r is a mixture of use rates over several scales at the end of the layer's last turn. Between a
    layer's turns its r stay as they are, so its residents are put in order once per turn (`scans`
    counts that) and the order is kept up as they come and go; a victim is the first of one of the
    L layers. A layer with more than its share of slots gives up first, by the square root of how
    much more: its time grows faster than its misses, so misses spread over the layers cost less
    than the same number in a few.
    """

    def __init__(
        self,
        layers: int,
        half_lives_tokens: Sequence[float] = HALF_LIVES_TOKENS,
        shares: Sequence[float] = SHARES,
    ) -> None:
        self.scans = 0
        self.counts = UseCounts(layers, half_lives_tokens, shares)
        self._residents = [_Residents() for _ in range(layers)]
        self._held = 0
        self._probation: dict[ExpertId, None] = {}
        turn = np.arange(layers)
        self._wait_passes = (turn[None, :] - turn[:, None] - 1) % layers / layers
        self._waits: list[list[float]] = self._wait_passes.tolist()
        # By layer: how late its first resident is used, by how much it is crowded, and both
        # together, seen from the layer that is being served.
        self._passes = np.full(layers, -math.inf)
        self._crowded = np.ones(layers)
        self._costs = np.full(layers, -math.inf)
        self._seen_from = (-1, 0)
        self._changed: set[int] = set()

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        layer, number = expert
        self.counts.used(layer, number, now, weight)
        self._residents[layer].sorted = False
        self._changed.add(layer)
        if self._probation:
            self._probation.pop(expert, None)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        layer, number = expert
        here = self._residents[layer]
        assert number not in here.members, f"{expert} has a slot already"
        here.members.add(number)
        if here.sorted and number not in here.fixed:
            here.insert(number)
        self._held += 1
        self._changed.add(layer)
        if prefetched:
            self._probation[expert] = None

    def removed(self, expert: ExpertId) -> None:
        layer, number = expert
        here = self._residents[layer]
        assert number in here.members, f"{expert} has no slot"
        here.members.remove(number)
        if number in here.fixed:
            here.fixed.remove(number)
        elif number in here.loosed:
            here.loosed.remove(number)
        elif here.sorted:
            here.remove(number)
        self._held -= 1
        self._changed.add(layer)
        self._probation.pop(expert, None)

    def fixed(self, expert: ExpertId) -> None:
        layer, number = expert
        here = self._residents[layer]
        if number in here.loosed:
            here.loosed.remove(number)
        elif here.sorted and number in here.members:
            here.remove(number)
            self._changed.add(layer)
        here.fixed.add(number)

    def loosed(self, expert: ExpertId) -> None:
        layer, number = expert
        here = self._residents[layer]
        here.fixed.remove(number)
        here.loosed.append(number)
        self._changed.add(layer)

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        for expert in self._probation:
            if may_go(expert):
                return expert
        self._look_from(layer)
        costs, waits = self._costs, self._waits[layer]
        places: dict[int, int] = {}
        found = None
        while costs[turn := int(costs.argmax())] > -math.inf:
            here, place = self._residents[turn], places.get(turn, 0)
            expert = ExpertId(turn, here.order[place])
            if may_go(expert):
                found = expert
                break
            places[turn] = place = place + 1
            costs[turn] = (here.passes(place) + waits[turn]) * self._crowded[turn]
        self._changed.update(places)
        return found

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return minus the expected passes until the next use; minus infinity on probation."""
        if expert in self._probation:
            return -math.inf
        rates = self.counts.rates(expert.layer)
        rate = rates[expert.expert] if expert.expert < len(rates) else 0.0
        waits = self._wait_passes[layer, expert.layer]
        return float(1.0 - waits - 1.0 / min(max(rate, RAREST), 1.0))

    def _look_from(self, layer: int) -> None:
        """Bring up to date what each layer's first resident costs, seen from `layer`."""
        fair = max(1.0, self._held) / len(self._residents)
        from_layer, held = self._seen_from
        for turn in self._changed:
            here = self._residents[turn]
            if not here.sorted or len(here.loosed) > FEW:
                self.scans += 1
                here.sort(self.counts.rates(turn))
            elif here.loosed:
                for number in here.loosed:
                    here.insert(number)
                here.loosed.clear()
            self._passes[turn] = here.passes(0)
            self._crowded[turn] = math.sqrt(max(len(here.members), 1) / fair)
        if held != self._held:
            everywhere = [max(len(here.members), 1) for here in self._residents]
            np.sqrt(np.array(everywhere) / fair, out=self._crowded)
        if (from_layer, held) != (layer, self._held):
            self._seen_from = (layer, self._held)
            np.multiply(self._passes + self._wait_passes[layer], self._crowded, out=self._costs)
        else:
            waits = self._waits[layer]
            for turn in self._changed:
                self._costs[turn] = (self._passes[turn] + waits[turn]) * self._crowded[turn]
        self._changed.clear()


class _Residents:
    """A layer's residents; while `sorted`, `order` has those that are not fixed, least used
    first."""

    def __init__(self) -> None:
        self.members: set[int] = set()
        self.fixed: set[int] = set()
        self.loosed: list[int] = []
        """Who has to find a place in `order` again: looked for when somebody asks."""
        self.order: list[int] = []
        self.sorted = False
        self._rates: list[float] = []

    def sort(self, rates: list[float]) -> None:
        self._rates = rates
        if self.members and max(self.members) >= len(rates):
            self._rates = rates + [0.0] * (max(self.members) + 1 - len(rates))
        self.order = sorted(self.members - self.fixed)
        self.order.sort(key=self._rates.__getitem__)
        self.sorted = True
        self.loosed.clear()

    def insert(self, number: int) -> None:
        if number >= len(self._rates):
            self._rates = self._rates + [0.0] * (number + 1 - len(self._rates))
        insort(self.order, number, key=self._key)

    def remove(self, number: int) -> None:
        del self.order[bisect_left(self.order, self._key(number), key=self._key)]

    def passes(self, place: int) -> float:
        """Return the passes expected until that place's next use, minus infinity at the end."""
        if place >= len(self.order):
            return -math.inf
        return 1.0 / min(max(self._rates[self.order[place]], RAREST), 1.0)

    def _key(self, number: int) -> tuple[float, int]:
        return self._rates[number], number
