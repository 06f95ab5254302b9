"""The books of residency: every use by where it was served, every byte by what came of it.

Counts go to `Counters`, which telemetry reads. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from runtime.cache import Slot
from runtime.telemetry import Counters
from runtime.trace import LayerStep, Prediction
from runtime.transfer_queue import Outcome, TransferEnded


class Books:
    """Written by residency only."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._expected: dict[int, set[int]] = {}

    def expect(self, predictions: Sequence[Prediction]) -> None:
        """Remember who was predicted, to say later which misses could have been foreseen."""
        for prediction in predictions:
            self.counters.guesses += len(prediction.guesses)
            named = self._expected.setdefault(prediction.layer, set())
            named.update([expert for expert, _ in prediction.guesses])

    def expected(self, layer: int) -> Set[int]:
        """Return who was predicted for a layer, once."""
        return self._expected.pop(layer, set())

    def routed(self, step: LayerStep) -> None:
        """A layer's router chose; others are predicted with it."""
        self.counters.routed += len(step.demands)
        self.expect(step.predictions)

    def missed(self, expected: bool) -> None:
        """A routed expert was in no slot."""
        self.counters.misses_predicted += expected

    def hit(self, slot: Slot, expected: bool) -> None:
        """A routed expert was in its slot; a prefetched one is used now."""
        if not slot.unused_prefetch_bytes:
            self.counters.served_resident += 1
            return
        self.counters.served_prefetch_in_time += 1
        self.counters.link_bytes_prefetch_used += slot.unused_prefetch_bytes
        self.counters.prefetches_used += 1
        self.counters.misses_predicted += expected
        slot.unused_prefetch_bytes = 0

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
