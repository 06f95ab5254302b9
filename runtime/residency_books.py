"""The books of residency: every use by where it was served, every byte by what came of it.

Counts go to `Counters`, which telemetry reads. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.cache import Slot
from runtime.telemetry import Counters
from runtime.trace import LayerStep, Prediction
from runtime.transfer_queue import Outcome, TransferEnded


class Books:
    """Written by residency only."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._expected: dict[int, list[Prediction]] = {}

    def expect(self, predictions: Sequence[Prediction]) -> None:
        """Remember who was predicted, to say later which misses could have been foreseen."""
        for prediction in predictions:
            self.counters.guesses += len(prediction.experts)
            self._expected.setdefault(prediction.layer, []).append(prediction)

    def routed(self, layer: int, step: LayerStep, missed: Sequence[int], found: int) -> None:
        """A layer's router chose; `missed` had not landed, and so many were `found`. Others are
        predicted with it."""
        self.counters.routed += len(step.demands)
        self.counters.served_resident += len(step.demands) - len(missed) - found
        if missed:
            self.counters.misses_predicted += len(self._foreseen(layer).intersection(missed))
        self._expected.pop(layer, None)
        self.expect(step.predictions)

    def found(self, slot: Slot) -> None:
        """An expert is used, for the first time, that a prefetch brought in time."""
        self.counters.served_prefetch_in_time += 1
        self.counters.link_bytes_prefetch_used += slot.unused_prefetch_bytes
        self.counters.prefetches_used += 1
        assert slot.expert is not None
        layer, number = slot.expert
        self.counters.misses_predicted += number in self._foreseen(layer)
        slot.unused_prefetch_bytes = 0

    def _foreseen(self, layer: int) -> set[int]:
        """Return who was predicted for a layer."""
        expected = self._expected.get(layer, ())
        return {number for each in expected for number in each.experts.tolist()}

    def awaited(self, slot: Slot, event: TransferEnded) -> None:
        """A copy landed that somebody waited for."""
        if slot.unused_prefetch_bytes:
            slot.unused_prefetch_bytes = 0
            self.counters.link_bytes_prefetch_late += event.issued_bytes
            self.counters.prefetches_used += 1
        else:
            self.counters.link_bytes_on_demand += event.issued_bytes

    def unawaited(self, slot: Slot, event: TransferEnded) -> None:
        """A copy landed that nobody waits for: a prefetch, or one for an abandoned layer."""
        if not slot.unused_prefetch_bytes:
            self.counters.link_bytes_on_demand += event.issued_bytes

    def lost(self, event: TransferEnded) -> None:
        """A transfer was cancelled or failed."""
        if event.outcome is Outcome.CANCELLED:
            self.counters.link_bytes_cancelled += event.issued_bytes
        else:
            self.counters.link_bytes_failed += event.issued_bytes
            self.counters.copies_failed += 1

    def evicted(self, victim: Slot) -> None:
        """A slot was emptied; what a prefetch brought there in vain is wasted."""
        self.counters.evictions += 1
        self.counters.link_bytes_prefetch_wasted += victim.unused_prefetch_bytes
