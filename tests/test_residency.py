"""Residency, one decision at a time; what holds in any order is in `test_residency_machine`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runtime.cache import CacheTable
from runtime.core import ExpertId, PolicyName
from runtime.eviction_lru import Lru
from runtime.policy import Moment, Reactive, Routed, Wish
from runtime.residency import Residency
from runtime.scheduler import MissPlan
from runtime.telemetry import Counters
from runtime.trace import LayerStep
from runtime.transfer_queue import Cancel, QueueState, Submit

SIZE = 100
HELD, GUESSED, MISSING = ExpertId(1, 2), ExpertId(1, 5), ExpertId(1, 6)


class OneGuess(Reactive):
    """Computes misses on the CPU and copies one expert of layer 1 ahead after layer 0."""

    name: PolicyName = "prescope"

    def __init__(self) -> None:
        self.eviction = Lru()

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        return MissPlan((), tuple(routed.misses))

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        return (Wish(GUESSED, 1.0, 0.9),) if layer == 0 else ()


def moment(residency: Residency, *unstarted: ExpertId) -> Moment:
    queue = QueueState(0.0, unstarted=frozenset(unstarted))
    cache = residency.cache
    return Moment(0.0, 1, False, 0.0, 0.0, queue, cache.free_slots, cache.here, cache.held)


@pytest.mark.parametrize("demands", [(HELD,), (HELD, MISSING)])
def test_a_prefetch_that_has_not_begun_is_cancelled_once_its_layer_does_without(
    demands: tuple[ExpertId, ...],
) -> None:
    residency = Residency(CacheTable(4, Lru()), OneGuess(), (SIZE, SIZE), Counters())
    residency.cache.landed(residency.cache.reserve(HELD, None, 0.0, prefetched=False)[0])
    first = residency.routed(0, LayerStep({0: 1}), moment(residency))
    assert first.cpu == (ExpertId(0, 0),)
    assert residency.ahead().orders == ()
    ordered = residency.layer_done(moment(residency)).orders
    assert [type(order) for order in ordered] == [Submit]
    step = LayerStep({expert.expert: 1 for expert in demands})
    steps = residency.routed(1, step, moment(residency, GUESSED))
    assert [expert for expert, _ in steps.compute] == [HELD]
    assert steps.orders == (Cancel(GUESSED),)


def test_what_is_on_the_link_is_not_cancelled() -> None:
    residency = Residency(CacheTable(4, Lru()), OneGuess(), (SIZE, SIZE), Counters())
    residency.routed(0, LayerStep({0: 1}), moment(residency))
    residency.layer_done(moment(residency))
    assert residency.routed(1, LayerStep({6: 1}), moment(residency)).orders == ()
