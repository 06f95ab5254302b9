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
from collections.abc import Callable

import numpy as np

from runtime.core import ExpertId
from runtime.eviction_frequency import HALF_LIFE_TOKENS, NEVER, DecayedScores, LowestFirst

FAR = 1000.0  # log2 of passes: later than this is never


class ExpectedNextUse:
    """Latest expected next use first; an unused prefetch whose layer has passed before all.

    r is estimated from the decayed score at the end of the layer's last turn: an expert that is
    used with probability r per token has the score r / (1 - 2 ** (-1 / half_life)) in the long
    run. Within a layer the next use is later where the score is lower, so one lazy heap per layer
    and a comparison of the L heads find the victim. `_bounds[t]` is never above the key of layer
    t's head, so the cost computed from it is an upper bound that is checked when it wins.
    """

    def __init__(self, layers: int, half_life_tokens: float = HALF_LIFE_TOKENS) -> None:
        self._scores = DecayedScores(half_life_tokens)
        self._residents = [LowestFirst(self._scores.keys) for _ in range(layers)]
        self._probation: dict[ExpertId, None] = {}
        self._log_share = math.log2(1.0 - 2.0 ** (-1.0 / half_life_tokens))
        self._bounds = np.full(layers, math.inf)
        turns = np.arange(layers)
        self._wait_passes = (turns[None, :] - turns[:, None] - 1) % layers / layers
        # The last turn of layers still to come in this pass was one token ago.
        self._log_last_turn = (turns[None, :] > turns[:, None]) / half_life_tokens
        self._costs = np.empty(layers)
        self._seen_from: tuple[float, int] | None = None

    @property
    def heap_operations(self) -> int:
        return sum(layer.heap_operations for layer in self._residents)

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        self._scores.use(expert, now, weight)
        self._probation.pop(expert, None)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        key = self._residents[expert.layer].add(expert)
        if key < self._bounds[expert.layer]:
            self._set_bound(expert.layer, key)
        if prefetched:
            self._probation[expert] = None

    def removed(self, expert: ExpertId) -> None:
        self._residents[expert.layer].remove(expert)
        self._probation.pop(expert, None)

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        for expert in self._probation:
            if may_go(expert):
                return expert
        if (now, layer) != self._seen_from:
            self._look_from(now, layer)
        costs = self._costs
        kept: list[tuple[float, ExpertId]] = []
        found = None
        while costs[turn := int(costs.argmax())] > NEVER:
            entry = self._residents[turn].lowest()
            if entry is None:
                self._bounds[turn], costs[turn] = math.inf, NEVER
            elif entry[0] != self._bounds[turn]:
                self._set_bound(turn, entry[0])
            elif may_go(entry[1]):
                found = entry[1]
                break
            else:
                kept.append(self._residents[turn].set_aside())
        for entry in reversed(kept):
            self._residents[entry[1].layer].put_back(entry)
            self._set_bound(entry[1].layer, entry[0])
        return found

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return minus the expected passes until the next use; minus infinity on probation."""
        if expert in self._probation:
            return NEVER
        key = self._scores.keys.get(expert, NEVER)
        return 1.0 - self._passes(expert.layer, key, now, layer)

    def _look_from(self, now: float, layer: int) -> None:
        """Work out `_costs` of all layers; they hold for every victim asked for from here."""
        self._seen_from = (now, layer)
        costs = self._costs
        log_now = now / self._scores.half_life_tokens - self._log_share
        np.subtract(log_now, self._bounds, out=costs)
        costs -= self._log_last_turn[layer]
        np.minimum(costs, FAR, out=costs)
        np.exp2(costs, out=costs)
        np.maximum(costs, 1.0, out=costs)
        costs += self._wait_passes[layer]

    def _set_bound(self, turn: int, key: float) -> None:
        self._bounds[turn] = key
        if self._seen_from is not None:
            self._costs[turn] = self._passes(turn, key, *self._seen_from)

    def _passes(self, turn: int, key: float, now: float, layer: int) -> float:
        """Return the expected passes until the next use, plus 1."""
        log_now = now / self._scores.half_life_tokens - self._log_share
        exponent = min(log_now - key - float(self._log_last_turn[layer, turn]), FAR)
        return float(max(2.0**exponent, 1.0) + self._wait_passes[layer, turn])
