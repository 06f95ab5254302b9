"""Eviction rules against brute force: who leaves, what that costs, and what cycles do to them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import eviction_next_use
from runtime.core import ExpertId
from runtime.errors import ConfigError
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency, DecayedScores
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_s3_fifo import S3Fifo
from runtime.eviction_table import EVICTIONS, make_eviction
from runtime.use_counts import HALF_LIVES_TOKENS, SHARES

LAYERS, EXPERTS, HALF_LIFE = 3, 4, 16.0
ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def at_scale(weight: float, half_life: float) -> float:
    """What a recency weight (decayed by 16 tokens) says of a count decayed by another half-life."""
    if weight <= 1.0:
        tokens_ago = -HALF_LIFE * math.log2(weight)
        return float(0.5 ** (tokens_ago / half_life))
    always = [0.5 ** (1 / h) / (1 - 0.5 ** (1 / h)) for h in (half_life, HALF_LIFE)]
    return 1 + (weight - 1) * min(always[0] / always[1], 1.0)


class Ledger:
    """Everything a rule was told, kept as it came: the ground for recomputing from scratch."""

    def __init__(self) -> None:
        self.uses: list[tuple[ExpertId, float, float]] = []
        self.touched: list[ExpertId] = []
        self.residents: list[ExpertId] = []
        self.probation: list[ExpertId] = []

    def used(self, expert: ExpertId, now: float, weight: float) -> None:
        self.uses.append((expert, now, weight))
        self.touched.append(expert)
        if expert in self.probation:
            self.probation.remove(expert)

    def admitted(self, expert: ExpertId, prefetched: bool) -> None:
        self.touched.append(expert)
        self.residents.append(expert)
        if prefetched:
            self.probation.append(expert)

    def removed(self, expert: ExpertId) -> None:
        self.residents.remove(expert)
        if expert in self.probation:
            self.probation.remove(expert)

    def score(self, expert: ExpertId, now: float) -> float:
        return sum(w * 0.5 ** ((now - t) / HALF_LIFE) for e, t, w in self.uses if e == expert)

    def rate(self, expert: ExpertId) -> float:
        """Probability of use per pass, at the layer's last turn, mixed from several scales."""
        turns = [t for e, t, _ in self.uses if e.layer == expert.layer]
        mixed = 0.0
        for half_life, share in zip(HALF_LIVES_TOKENS, SHARES, strict=True):
            per_token = 1 - 0.5 ** (1 / half_life)
            for used, at, weight in self.uses:
                if used == expert:
                    decayed = 0.5 ** ((turns[-1] - at) / half_life)
                    mixed += share * per_token * at_scale(weight, half_life) * decayed
        return min(mixed, 1.0)

    def next_use(self, expert: ExpertId, layer: int) -> float:
        """Expected passes until the next use, as the rule states it."""
        waits = ((expert.layer - layer - 1) % LAYERS) / LAYERS
        return waits + (1 / self.rate(expert) - 1 if self.rate(expert) > 0 else math.inf)

    def lateness(self, expert: ExpertId, layer: int) -> float:
        """What the rule evicts by: the next use, weighed by how many slots its layer has."""
        held = sum(resident.layer == expert.layer for resident in self.residents)
        fair = max(1, len(self.residents)) / LAYERS
        return (self.next_use(expert, layer) + 1) * math.sqrt(max(held, 1) / fair)

    def recency(self, expert: ExpertId) -> int:
        return max((i for i, e in enumerate(self.touched) if e == expert), default=-1)


Step = tuple[str, int, float, bool]
SEEDS = range(12)
ACTIONS = ("used", "used", "used", "admitted", "admitted", "removed", "victim", "victim")


def script(seed: int, steps: int = 250) -> list[Step]:
    """What happens, to which expert, after how many tokens, and which way."""
    draw = random.Random(seed)
    tokens = (0.0, 0.0, 1.0, 1.0, 40.0)
    return [
        (draw.choice(ACTIONS), draw.randrange(len(ALL)), draw.choice(tokens), draw.random() < 0.5)
        for _ in range(steps)
    ]


def replay(
    rule: Eviction,
    story: list[Step],
    judge: Callable[[Ledger, set[ExpertId], ExpertId, float, int], None],
) -> None:
    """Tell rule and ledger the same story; `judge` looks at every victim. Time passes by tokens."""
    ledger, now = Ledger(), 0.0
    for action, number, passed, flag in story:
        now += passed
        expert = ALL[number]
        layer = number % LAYERS
        if action == "used":
            weight = (2.5, 0.4)[number % 2] if flag else 1.0
            rule.used(expert, now, weight)
            ledger.used(expert, now, weight)
        elif action == "admitted" and expert not in ledger.residents:
            rule.admitted(expert, now, prefetched=flag)
            ledger.admitted(expert, flag)
        elif action == "removed" and expert in ledger.residents:
            rule.removed(expert)
            ledger.removed(expert)
        elif action == "victim":
            may_go = {e for e in ledger.residents if not flag or (e.layer + e.expert) % 3}
            victim = rule.victim(may_go.__contains__, now, layer)
            assert (victim is None) == (not may_go)
            if victim is not None:
                assert victim in may_go
                judge(ledger, may_go, victim, now, layer)
                assert rule.victim(may_go.__contains__, now, layer) == victim, "asking twice"
                rule.removed(victim)
                ledger.removed(victim)


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


class NaiveS3Fifo:
    """The published pseudocode on plain lists, newest first, for a cache that is full."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.small: list[ExpertId] = []
        self.main: list[ExpertId] = []
        self.ghost: list[ExpertId] = []
        self.uses: dict[ExpertId, int] = {}

    def read(self, expert: ExpertId) -> bool:
        if expert in self.small or expert in self.main:
            self.uses[expert] = min(self.uses[expert] + 1, 3)
            return True
        while len(self.small) + len(self.main) >= self.slots:
            if len(self.small) >= 0.1 * self.slots:
                self.evict_small()
            else:
                self.evict_main()
        if expert in self.ghost:
            self.ghost.remove(expert)
            self.main.insert(0, expert)
        else:
            self.small.insert(0, expert)
        self.uses[expert] = 0
        return False

    def evict_small(self) -> None:
        while self.small:
            tail = self.small.pop()
            if self.uses[tail] > 1:
                self.main.insert(0, tail)
                self.uses[tail] = 0
                if len(self.main) > round(0.9 * self.slots):
                    self.evict_main()
                    return
            else:
                self.ghost.insert(0, tail)
                del self.ghost[max(1, round(0.9 * self.slots)) :]
                return
        self.evict_main()

    def evict_main(self) -> None:
        while self.main:
            tail = self.main.pop()
            if not self.uses[tail]:
                return
            self.uses[tail] -= 1
            self.main.insert(0, tail)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 10, 12, 30])
def test_s3_fifo_equals_the_published_pseudocode(slots: int) -> None:
    rule, naive, residents = S3Fifo(), NaiveS3Fifo(slots), set[ExpertId]()
    draw = random.Random(slots)
    for now in range(1500):
        expert = ExpertId(0, min(int(draw.expovariate(1.5 / slots)), 4 * slots))
        hit = expert in residents
        rule.used(expert, float(now))
        if not hit:
            if len(residents) == slots:
                victim = rule.victim(residents.__contains__, float(now), 0)
                assert victim is not None
                rule.removed(victim)
                residents.remove(victim)
            rule.admitted(expert, float(now), prefetched=False)
            residents.add(expert)
        assert naive.read(expert) == hit
        assert residents == {*naive.small, *naive.main}


@pytest.mark.parametrize("seed", SEEDS)
def test_s3_fifo_never_evicts_what_must_stay(seed: int) -> None:
    rule = S3Fifo()

    def judge(
        ledger: Ledger, may_go: set[ExpertId], victim: ExpertId, now: float, layer: int
    ) -> None:
        absent = [e for e in ALL if e not in ledger.residents]
        assert all(rule.worth(victim, now, layer) < rule.worth(e, now, layer) for e in absent)

    replay(rule, script(seed), judge)


def test_s3_fifo_does_not_count_the_use_a_prefetch_was_made_for() -> None:
    for prefetched in (False, True):
        rule = S3Fifo()
        for expert in ALL[:2]:
            if not prefetched:
                rule.used(expert, 0.0)
            rule.admitted(expert, 0.0, prefetched=prefetched)
            if prefetched:
                rule.used(expert, 0.0)
        rule.used(ALL[0], 1.0)
        assert rule.victim(lambda e: True, 1.0, 0) == ALL[0], "one more use is not enough"
        rule.used(ALL[0], 1.0)
        assert rule.victim(lambda e: True, 1.0, 0) == ALL[1], "two more uses are"


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0.01, 40)), min_size=1, max_size=40))
def test_scores_stay_exact_over_long_times(gaps: list[tuple[float, float]]) -> None:
    scores, now, naive = DecayedScores(HALF_LIFE), 0.0, 0.0
    for gap, weight in gaps:
        now += gap
        naive = naive * 0.5 ** (gap / HALF_LIFE) + weight
        scores.use(ALL[0], now, weight)
    assert scores.score(ALL[0], now) == pytest.approx(naive, rel=1e-6)


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
