"""The offline optimum against exhaustive search, and against every rule that plays by its terms."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.eviction_table import EVICTIONS, make_eviction
from runtime.offline import NEVER, OfflineOptimal, next_uses, offline_misses
from runtime.trace import ForwardPass, LayerStep

Demands = list[list[set[int]]]  # [pass][layer] -> experts


def passes_of(demands: Demands) -> list[ForwardPass]:
    return [
        ForwardPass(1, tuple(LayerStep(dict.fromkeys(sorted(experts), 1)) for experts in layers))
        for layers in demands
    ]


def demands(
    layers: int, experts: int, most_passes: int, most_demanded: int
) -> st.SearchStrategy[Demands]:
    routed = st.sets(st.integers(0, experts - 1), min_size=1, max_size=most_demanded)
    one_pass = st.lists(routed, min_size=layers, max_size=layers)
    return st.lists(one_pass, min_size=1, max_size=most_passes)


def drawn(
    seed: int, passes: int, layers: int = 3, experts: int = 5, most_demanded: int = 3
) -> Demands:
    """A random trace; some experts are asked for far more often than others."""
    draw = random.Random(seed)
    weights = [1 / (1 + number) for number in range(experts)]
    return [
        [
            set(draw.choices(range(experts), weights, k=draw.randint(1, most_demanded)))
            for _ in range(layers)
        ]
        for _ in range(passes)
    ]


def subsets(items: Iterable[ExpertId], most: int) -> list[frozenset[ExpertId]]:
    pool = sorted(items)
    return [
        frozenset(chosen)
        for size in range(min(most, len(pool)) + 1)
        for chosen in itertools.combinations(pool, size)
    ]


def exhaustive(trace: Demands, slots: int, free_start: bool) -> int:
    """Fewest loads plus CPU-served uses, trying every placement before and after every step.

    Anything may be copied ahead at any time, at the price of a load; a miss costs one, loaded or
    computed on the CPU; everything at hand after a step may stay, as far as there are slots.
    """
    everyone = {
        ExpertId(layer, e) for one in trace for layer, routed in enumerate(one) for e in routed
    }
    placements = subsets(everyone, slots)
    best = {p: 0 if free_start else len(p) for p in placements}
    for one in trace:
        for layer, routed in enumerate(one):
            needed = {ExpertId(layer, e) for e in routed}
            after: dict[frozenset[ExpertId], int] = {}
            for before, cost in best.items():
                served = cost + len(needed - before)
                for placement in placements:
                    ahead = len(placement - before - needed)
                    if served + ahead < after.get(placement, 1 << 30):
                        after[placement] = served + ahead
            best = after
    return min(best.values())


@settings(max_examples=150, deadline=None)
@given(demands(2, 3, 5, 3), st.integers(0, 4), st.booleans())
def test_nobody_can_do_better_and_it_can_be_reached(
    trace: Demands, slots: int, free_start: bool
) -> None:
    found = offline_misses(passes_of(trace), slots, free_start=free_start)
    assert found == exhaustive(trace, slots, free_start)


@settings(max_examples=60, deadline=None)
@given(demands(1, 6, 9, 2), st.integers(0, 4))
def test_one_layer_and_more_experts_than_slots(trace: Demands, slots: int) -> None:
    assert offline_misses(passes_of(trace), slots) == exhaustive(trace, slots, False)


def naive_next_use(trace: Demands, at_pass: int, layer: int, expert: int) -> int:
    later = (p for p in range(at_pass + 1, len(trace)) if expert in trace[p][layer])
    return next((p * len(trace[0]) + layer for p in later), NEVER)


@pytest.mark.parametrize("seed", range(10))
def test_next_uses_are_those_a_search_ahead_finds(seed: int) -> None:
    trace = drawn(seed, 12)
    found = next_uses(passes_of(trace))
    for at_pass, layers in enumerate(trace):
        for layer, routed in enumerate(layers):
            expected = {e: naive_next_use(trace, at_pass, layer, e) for e in routed}
            assert found[at_pass][layer] == expected


def play(trace: Demands, slots: int, rule: Eviction, bypass: bool) -> int:
    """Serve every step, admitting misses (with `bypass` only those worth more than the victim)."""
    residents: set[ExpertId] = set()
    misses = 0
    for now, layers in enumerate(trace):
        for layer, routed in enumerate(layers):
            if isinstance(rule, OfflineOptimal):
                rule.at(now, layer)
            needed = [ExpertId(layer, e) for e in sorted(routed)]
            for expert in needed:
                rule.used(expert, float(now))
            for expert in [e for e in needed if e not in residents]:
                misses += 1
                if len(residents) == slots:
                    victim = rule.victim(residents.__contains__, float(now), layer)
                    if victim is None or bypass:
                        worth = rule.worth(expert, float(now), layer)
                        if victim is None or worth <= rule.worth(victim, float(now), layer):
                            continue
                    rule.removed(victim)
                    residents.remove(victim)
                rule.admitted(expert, float(now), prefetched=False)
                residents.add(expert)
    return misses


@pytest.mark.parametrize("slots", range(9))
def test_the_oracle_rule_with_bypass_reaches_the_optimum(slots: int) -> None:
    for seed in range(10):
        passes = passes_of(trace := drawn(seed, 30))
        reached = play(trace, slots, OfflineOptimal(passes), bypass=True)
        assert reached == offline_misses(passes, slots), f"seed {seed}"


@pytest.mark.parametrize("name", sorted(EVICTIONS))
@pytest.mark.parametrize("bypass", [False, True])
def test_no_rule_misses_less(name: str, bypass: bool) -> None:
    for seed, slots in itertools.product(range(5), (1, 3, 6, 10)):
        passes = passes_of(trace := drawn(seed, 30))
        optimum = offline_misses(passes, slots)
        assert play(trace, slots, make_eviction(name, (16,) * 3), bypass) >= optimum
        assert optimum >= offline_misses(passes, slots, free_start=True)
        assert optimum >= offline_misses(passes, slots + 1)


def test_the_bound_is_tighter_than_chance_and_not_trivial() -> None:
    draw = random.Random(3)
    trace = [[set(draw.sample(range(16), 4)) for _ in range(6)] for _ in range(100)]
    uses = 100 * 6 * 4
    optimum = offline_misses(passes_of(trace), 24)
    lru = play(trace, 24, make_eviction("lru", (16,) * 6), bypass=False)
    assert 0.4 * uses < optimum < 0.55 * uses
    assert 0.7 * uses < lru < 0.8 * uses, "chance is a miss in 72 of 96"


def test_known_cases() -> None:
    cycle = passes_of([[{0, 1}, {0, 1}]] * 10)
    assert offline_misses(cycle, 0) == 40
    assert offline_misses(cycle, 4) == 4
    assert offline_misses(cycle, 4, free_start=True) == 0
    assert offline_misses(cycle, 3) == 4 + 9, "one of four misses in every later pass"
    assert offline_misses(passes_of([[{0}], [{1}], [{0}]]), 1) == 2, "the one in between bypasses"
    assert offline_misses([], 4) == 0


@pytest.mark.parametrize("seed", range(10))
def test_the_oracle_knows_the_next_use_of_everyone_at_every_step(seed: int) -> None:
    trace, draw = drawn(seed, 10), random.Random(seed)
    rule = OfflineOptimal(passes_of(trace))
    everyone = [ExpertId(layer, e) for layer in range(3) for e in range(5)]
    stay = set(draw.sample(everyone, 4))
    for expert in everyone:
        rule.admitted(expert, 0.0, prefetched=False)

    def naive(expert: ExpertId, now: int) -> int:
        uses = (p for p in range(len(trace)) if expert.expert in trace[p][expert.layer])
        steps = (p * 3 + expert.layer for p in uses)
        return min((step for step in steps if step > now), default=NEVER)

    for step in range(len(trace) * 3):
        if draw.random() < 0.5:
            continue
        rule.at(*divmod(step, 3))
        for expert in everyone:
            assert rule.worth(expert, 0.0, 0) == -naive(expert, step)
        victim = rule.victim(lambda e: e not in stay, 0.0, 0)
        assert victim is not None
        assert naive(victim, step) == max(naive(e, step) for e in everyone if e not in stay)


def test_the_oracle_is_not_told_of_the_past() -> None:
    rule = OfflineOptimal(passes_of([[{0}], [{1}]]))
    rule.at(1, 0)
    with pytest.raises(AssertionError, match="step 0 comes after step 1"):
        rule.at(0, 0)
