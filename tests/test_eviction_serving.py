"""Eviction rules that serve demands: hit rates in cycles and under skew, and work within bounds."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from runtime import eviction_next_use
from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_s3_fifo import S3Fifo
from tests.eviction_ledger import ALL, EXPERTS, LAYERS


def serve(
    rule: Eviction,
    passes: list[list[list[int]]],
    slots: int,
    warm_up: int = 0,
    events: list[int] | None = None,
) -> float:
    """Play demands [pass][layer] through `slots`, loading every miss; return the hit rate.

    `events` collects the number of protocol calls.
    """
    residents: set[ExpertId] = set()
    hits = uses = calls = 0
    for now, layers in enumerate(passes):
        for layer, demanded in enumerate(layers):
            needed = {ExpertId(layer, expert) for expert in demanded}
            may_go = lambda e, needed=needed: e not in needed  # noqa: E731
            for expert in sorted(needed):
                calls += 1
                rule.used(expert, float(now))
                if now >= warm_up:
                    uses += 1
                    hits += expert in residents
            for expert in sorted(needed - residents):
                if len(residents) == slots:
                    victim = rule.victim(may_go, float(now), layer)
                    assert victim is not None
                    rule.removed(victim)
                    residents.remove(victim)
                    calls += 2
                rule.admitted(expert, float(now), prefetched=False)
                residents.add(expert)
                calls += 1
    if events is not None:
        events.append(calls)
    return hits / uses


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_in_a_cycle_expected_next_use_keeps_a_share_where_lru_keeps_nothing(share: float) -> None:
    layers, experts = 12, 16
    passes = [[list(range(experts)) for _ in range(layers)] for _ in range(40)]
    slots = int(share * layers * experts)
    ours = serve(ExpectedNextUse((experts,) * layers), passes, slots, warm_up=4)
    # A layer's own experts must all be here at once, so up to one layer's worth turns over.
    assert (slots - experts) / (layers * experts) <= ours <= share
    assert serve(Lru(), passes, slots, warm_up=4) == 0.0


def skewed(
    passes: int, layers: int, experts: int, top_k: int, seed: int = 0
) -> list[list[list[int]]]:
    """Independent choices with a fixed skew per layer: what frequency is made for."""
    draw = random.Random(seed)
    favourites = [draw.sample(range(experts), experts) for _ in range(layers)]
    weights = [1 / (rank + 1) for rank in range(experts)]
    chosen = []
    for _ in range(passes):
        one = []
        for order in favourites:
            picked: set[int] = set()
            while len(picked) < top_k:
                picked.update(draw.choices(order, weights))
            one.append(sorted(picked))
        chosen.append(one)
    return chosen


def test_frequency_rules_beat_lru_where_the_skew_is_fixed() -> None:
    passes = skewed(400, 6, 32, 4)
    lru, frequency, ours, s3 = (
        serve(rule, passes, 48, warm_up=100)
        for rule in (Lru(), DecayedFrequency(), ExpectedNextUse((32,) * 6), S3Fifo())
    )
    assert frequency > lru + 0.02
    assert ours > lru + 0.02
    assert s3 > lru + 0.02


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every layer that expected next use looks through."""
    found: list[int] = []
    search = eviction_next_use._next

    def counted(*arguments: Any) -> int:
        found.append(1)
        return search(*arguments)

    interpreted = eviction_next_use._look.py_func  # type: ignore[attr-defined]
    monkeypatch.setattr(eviction_next_use, "_look", interpreted)
    monkeypatch.setattr(eviction_next_use, "_next", counted)
    return found


@pytest.mark.parametrize("size", [16, 64])
def test_work_is_bounded_by_the_calls_whatever_the_number_of_experts(
    size: int, searches: list[int]
) -> None:
    frequency, calls = DecayedFrequency(), list[int]()
    serve(frequency, skewed(200, 8, size, 4), 2 * size, events=calls)
    assert 0 < frequency.heap_operations <= 2 * calls[0]
    ours = ExpectedNextUse((size,) * 8)
    serve(ours, skewed(200, 8, size, 4), 2 * size, events=calls)
    assert 0 < len(searches) <= calls[1]


def test_a_use_costs_no_search(searches: list[int]) -> None:
    frequency, ours = DecayedFrequency(), ExpectedNextUse((EXPERTS,) * LAYERS)
    for rule, expert in itertools.product((frequency, ours), ALL):
        rule.admitted(expert, 0.0, prefetched=False)
    before = frequency.heap_operations
    for now, expert in itertools.product(range(50), ALL):
        frequency.used(expert, float(now))
        ours.used(expert, float(now))
    assert frequency.heap_operations == before
    assert not searches
