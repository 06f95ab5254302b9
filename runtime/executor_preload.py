"""Filling slots before the first token: the experts of choice, copied while nothing else runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from runtime.cache import CacheTable
from runtime.core import ExpertId
from runtime.errors import CancelledError
from runtime.transfer_queue import Cause, Order, Outcome, Submit, TransferEnded

AT_A_TIME = 32
"""Copies ordered at once: how long a person who cancels waits."""


class Ports(Protocol):
    """What filling asks of the executor."""

    def order(self, orders: Sequence[Order]) -> None: ...

    def ended(self, wait: bool) -> Sequence[TransferEnded]: ...


def preload(
    ports: Ports,
    cache: CacheTable,
    experts: Sequence[ExpertId],
    layer_bytes: Sequence[int],
    cancelled: Callable[[], bool],
) -> None:
    """Copy `experts` into free slots, the last of them admitted last; a copy that fails leaves its
    slot free.

    Raises:
        CancelledError: `cancelled` returned True; what was ordered has landed.
    """
    left = iter(experts)
    while batch := list(islice(left, min(AT_A_TIME, cache.free_slots))):
        if cancelled():
            raise CancelledError("Loading was stopped.")
        orders = []
        for expert in batch:
            number, _ = cache.reserve(expert, None, 0.0, prefetched=False)
            orders.append(Submit(expert, number, layer_bytes[expert.layer], Cause.DEMAND))
        ports.order(orders)
        landing = len(orders)
        while landing:
            for event in ports.ended(wait=True):
                landing -= 1
                if event.outcome is Outcome.LANDED:
                    cache.landed(event.slot)
                else:
                    cache.release(event.slot)
