"""MoE-Infinity's eviction: the resident expert with the lowest predicted reuse leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.activation_tracing import MoeInfinityTracer
from runtime.core import ExpertId
from runtime.eviction import Eviction


class ActivationEviction(Eviction):
    """Lowest `MoeInfinityTracer.reuse` first. Uses reach the tracer by its own `routed`."""

    def __init__(self, tracer: MoeInfinityTracer) -> None:
        self._tracer = tracer
        self._resident = np.zeros((tracer.layers, tracer.experts), np.bool_)
        self._values = np.full((tracer.layers, tracer.experts), np.inf)
        self._values_of = -1

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        """Nothing to do: the tracer is told of whole layers."""

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        assert not self._resident[expert], f"{expert} has a slot already"
        self._resident[expert] = True
        self._values_of = -1

    def removed(self, expert: ExpertId) -> None:
        assert self._resident[expert], f"{expert} has no slot"
        self._resident[expert] = False
        self._values[expert] = np.inf

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        if self._values_of != self._tracer.changes:
            self._values = np.where(self._resident, self._tracer.reuse(), np.inf)
            self._values_of = self._tracer.changes
        values = self._values.ravel()
        kept = []
        found = None
        while values[number := int(values.argmin())] < np.inf:
            expert = ExpertId(*divmod(number, self._tracer.experts))
            if may_go(expert):
                found = expert
                break
            kept.append((number, values[number]))
            values[number] = np.inf
        for number, value in kept:
            values[number] = value
        return found

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return the predicted reuse."""
        return float(self._tracer.reuse()[expert])
