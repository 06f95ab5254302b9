"""Eviction rules against brute force: who leaves, who must stay, and what a use is worth later."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core import ExpertId
from runtime.errors import ConfigError
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency, DecayedScores
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_table import EVICTIONS, make_eviction
from tests.eviction_ledger import ALL, EXPERTS, HALF_LIFE, LAYERS, SEEDS, Ledger, replay, script


def probation_first(ledger: Ledger, may_go: set[ExpertId], victim: ExpertId) -> bool:
    unused = [e for e in ledger.probation if e in may_go]
    if unused:
        assert victim == unused[0]
    return bool(unused)


@pytest.mark.parametrize("seed", SEEDS)
def test_lru_evicts_what_was_touched_longest_ago(seed: int) -> None:
    rule = Lru()

    def judge(ledger: Ledger, may_go: set[ExpertId], victim: ExpertId, *_: float) -> None:
        assert victim == min(may_go, key=ledger.recency)
        by_worth = sorted(ALL, key=lambda e: rule.worth(e, 0.0, 0))
        assert [e for e in by_worth if ledger.recency(e) >= 0] == sorted(
            set(ledger.touched), key=ledger.recency
        )

    replay(rule, script(seed), judge)


@pytest.mark.parametrize("seed", SEEDS)
def test_decayed_frequency_equals_the_naive_sum_over_all_uses(seed: int) -> None:
    rule = DecayedFrequency(HALF_LIFE)

    def judge(
        ledger: Ledger, may_go: set[ExpertId], victim: ExpertId, now: float, layer: int
    ) -> None:
        for expert in set(ALL) - set(ledger.probation):
            assert rule.worth(expert, now, layer) == pytest.approx(ledger.score(expert, now))
        if not probation_first(ledger, may_go, victim):
            lowest = min(ledger.score(e, now) for e in may_go)
            assert ledger.score(victim, now) == pytest.approx(lowest, rel=1e-9)

    replay(rule, script(seed), judge)


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_next_use_equals_the_rule_recomputed_from_every_use(seed: int) -> None:
    rule = ExpectedNextUse((EXPERTS,) * LAYERS)

    def judge(
        ledger: Ledger, may_go: set[ExpertId], victim: ExpertId, now: float, layer: int
    ) -> None:
        for expert in set(ALL) - set(ledger.probation):
            expected = ledger.next_use(expert, layer)
            got = -rule.worth(expert, now, layer)
            assert got == pytest.approx(expected, rel=1e-6) or min(expected, got) > 1e17
        if not probation_first(ledger, may_go, victim):
            latest = max(ledger.lateness(e, layer) for e in may_go)
            assert min(latest, 1e18) == pytest.approx(min(ledger.lateness(victim, layer), 1e18))

    replay(rule, script(seed), judge)


@pytest.mark.parametrize("seed", SEEDS)
def test_hearing_who_is_fixed_changes_no_victim(seed: int) -> None:
    """One rule is told who must stay and one only asked about everybody: both name the same."""
    draw, now = random.Random(seed), 0.0
    told, asked = ExpectedNextUse((EXPERTS,) * LAYERS), ExpectedNextUse((EXPERTS,) * LAYERS)
    residents: set[ExpertId] = set()
    fixed: set[ExpertId] = set()
    victims = 0
    for _ in range(800):
        expert, layer = draw.choice(ALL), draw.randrange(LAYERS)
        now += draw.choice((0.0, 0.0, 1.0))
        match draw.choice(("used", "used", "in", "fix", "loose", "victim", "out")):
            case "used":
                for rule in (told, asked):
                    rule.used(expert, now)
            case "in" if expert not in residents:
                loading = draw.random() < 0.5
                if loading:
                    told.fixed(expert)
                    fixed.add(expert)
                for rule in (told, asked):
                    rule.admitted(expert, now, prefetched=False)
                residents.add(expert)
            case "fix" if expert in residents - fixed:
                told.fixed(expert)
                fixed.add(expert)
            case "loose" if fixed:
                loosed = draw.choice(sorted(fixed))
                told.loosed(loosed)
                fixed.remove(loosed)
            case "out" if expert in residents:
                for rule in (told, asked):
                    rule.removed(expert)
                residents.remove(expert)
                fixed.discard(expert)
            case "victim":
                may_go = residents - fixed
                found = [rule.victim(may_go.__contains__, now, layer) for rule in (told, asked)]
                assert found[0] == found[1]
                assert (found[0] is None) == (not may_go)
                # Told who must stay, it does not even ask about them.
                assert told.victim(lambda e: True, now, layer) == found[0]
                victims += found[0] is not None
    assert victims > 20


@pytest.mark.parametrize("name", sorted(EVICTIONS))
def test_a_layer_at_once_is_the_same_as_its_experts_one_by_one(name: str) -> None:
    draw, now = random.Random(5), 0.0
    whole, single = (make_eviction(name, (EXPERTS,) * LAYERS) for _ in range(2))
    for expert in ALL:
        for rule in (whole, single):
            rule.admitted(expert, now, prefetched=expert.expert == 0)
    for _ in range(200):
        now += draw.choice((1.0, 1.0, 30.0))
        layer = draw.randrange(LAYERS)
        chosen = draw.sample(range(EXPERTS), draw.randint(1, EXPERTS))
        weights = [draw.choice((0.0, 0.3, 1.0, 2.5)) for _ in chosen]
        weighted = draw.random() < 0.5
        whole.used_all(layer, np.array(chosen), now, np.array(weights) if weighted else None)
        for number, weight in zip(chosen, weights, strict=True):
            single.used(ExpertId(layer, number), now, weight if weighted else 1.0)
        may_go = set(draw.sample(ALL, draw.randint(1, len(ALL))))
        at = draw.randrange(LAYERS)
        assert whole.victim(may_go.__contains__, now, at) == single.victim(
            may_go.__contains__, now, at
        )


@pytest.mark.parametrize("rate", [0.05, 0.25, 1.0])
def test_the_rate_of_use_is_what_it_is(rate: float) -> None:
    rule, draw = ExpectedNextUse((EXPERTS,), (64.0, 512.0), (0.5, 0.5)), random.Random(1)
    found = []
    for now in range(6000):
        rule.used(ALL[1], float(now))  # the layer's turn
        if draw.random() < rate:
            rule.used(ALL[0], float(now))
        if now > 3000:
            found.append(1 / (1 - rule.worth(ALL[0], float(now), 0)))
    assert sum(found) / len(found) == pytest.approx(rate, rel=0.15)


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0.01, 40)), min_size=1, max_size=40))
def test_scores_stay_exact_over_long_times(gaps: list[tuple[float, float]]) -> None:
    scores, now, naive = DecayedScores(HALF_LIFE), 0.0, 0.0
    for gap, weight in gaps:
        now += gap
        naive = naive * 0.5 ** (gap / HALF_LIFE) + weight
        scores.use(ALL[0], now, weight)
    assert scores.score(ALL[0], now) == pytest.approx(naive, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_sparing_someone_is_the_same_as_refusing_and_ends_when_nobody_else_is_left(
    seed: int,
) -> None:
    """One rule is told whom to spare and one only asked: both name the same, until one is told
    that the spared may go as well."""
    draw, now = random.Random(seed), 0.0
    told, asked = ExpectedNextUse((EXPERTS,) * LAYERS), ExpectedNextUse((EXPERTS,) * LAYERS)
    residents: set[ExpertId] = set()
    spared: dict[int, list[int]] = {}
    victims = 0
    for _ in range(600):
        expert, layer = draw.choice(ALL), draw.randrange(LAYERS)
        now += draw.choice((0.0, 1.0))
        match draw.choice(("used", "used", "in", "spare", "victim", "out")):
            case "used":
                for rule in (told, asked):
                    rule.used(expert, now)
            case "in" if expert not in residents:
                for rule in (told, asked):
                    rule.admitted(expert, now, prefetched=False)
                residents.add(expert)
            case "out" if expert in residents:
                for rule in (told, asked):
                    rule.removed(expert)
                residents.remove(expert)
            case "spare":
                spared[layer] = draw.sample(range(EXPERTS), draw.randrange(EXPERTS + 1))
                told.spare(layer, spared[layer])
            case "victim":
                others = {e for e in residents if e.expert not in spared.get(e.layer, ())}
                expected = asked.victim(others.__contains__, now, layer)
                assert told.victim(others.__contains__, now, layer) == expected
                if others:
                    assert told.victim(lambda e: True, now, layer) == expected
                    victims += 1
                else:
                    last = asked.victim(lambda e: True, now, layer)
                    assert told.victim(lambda e: True, now, layer) == last
    assert victims > 20


@pytest.mark.parametrize("rule", [DecayedFrequency(), ExpectedNextUse((EXPERTS,) * LAYERS)])
def test_an_unused_prefetch_goes_first_once_it_may_and_a_used_one_does_not(rule: Eviction) -> None:
    cold, guess = ExpertId(0, 0), ExpertId(1, 0)
    rule.used(cold, 0.0)
    rule.admitted(cold, 0.0, prefetched=False)
    for now in range(10):
        rule.used(guess, float(now))
    rule.admitted(guess, 10.0, prefetched=True)
    assert rule.victim(lambda e: e != guess, 10.0, 0) == cold, "protected until its layer"
    assert rule.victim(lambda e: True, 10.0, 1) == guess
    rule.used(guess, 10.0)
    assert rule.victim(lambda e: True, 10.0, 1) == cold


@pytest.mark.parametrize("name", sorted(EVICTIONS))
def test_every_rule_names_a_victim_exactly_when_someone_may_go(name: str) -> None:
    for seed in SEEDS:
        replay(make_eviction(name, (EXPERTS,) * LAYERS), script(seed), lambda *_: None)


@pytest.mark.parametrize("name", sorted(EVICTIONS))
def test_an_expert_cannot_get_a_second_slot(name: str) -> None:
    rule = make_eviction(name, (EXPERTS,) * LAYERS)
    rule.admitted(ALL[0], 0.0, prefetched=False)
    with pytest.raises(AssertionError, match="has a slot already"):
        rule.admitted(ALL[0], 1.0, prefetched=False)


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'fifo'"):
        make_eviction("fifo", (EXPERTS,) * LAYERS)
