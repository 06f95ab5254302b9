"""What a slot is worth: estimates of use that die away, and that have to come true."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtime.core import ExpertId
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.policy_slot_value import CHECK_PASSES, SlotValue

EXPERTS = 16
FAVOURITE, VICTIM = ExpertId(0, 0), ExpertId(0, EXPERTS - 1)


def counted(uses: list[float]) -> ExpectedNextUse:
    eviction = ExpectedNextUse((EXPERTS,))
    for token in uses:
        eviction.used(FAVOURITE, token)
    return eviction


@pytest.mark.parametrize("passes", [1.0, 8.0, 32.0])
def test_who_is_used_in_every_pass_will_be_used_in_every_pass(passes: float) -> None:
    always = counted([float(token) for token in range(2000)])
    always.counts.look_ahead([passes])
    assert always.counts.uses(0, 0)[FAVOURITE.expert] == pytest.approx(passes, rel=0.01)


def test_a_single_use_promises_less_per_pass_the_longer_one_looks_ahead() -> None:
    once = counted([100.0])
    once.counts.look_ahead((1.0, 8.0, 32.0))
    promised = [once.counts.uses(0, horizon)[FAVOURITE.expert] for horizon in range(3)]
    assert 0.0 < promised[0] < promised[1] < promised[2] < 1.5
    assert promised[2] < 0.3 * 32 * promised[0]
    assert once.counts.uses(0, 1)[3] == 0.0


def trust_after(seed: int, lasting: bool, passes: int = 300) -> float:
    """Route three experts per pass: from a set that changes now and then, or just anyone."""
    draw = random.Random(seed)
    eviction = ExpectedNextUse((EXPERTS,))
    value = SlotValue(eviction, (EXPERTS,))
    hot = draw.sample(range(EXPERTS), 5)
    for token in range(passes):
        if token % 40 == 0:
            hot = draw.sample(range(EXPERTS), 5)
        chosen = draw.sample(hot if lasting else range(EXPERTS), 3)
        for number in chosen:
            eviction.used(ExpertId(0, number), float(token))
        value.used(0, np.array(chosen), float(token), prompt=False)
        rest = [e for e in range(EXPERTS) if e not in chosen]
        value.replaces(ExpertId(0, draw.choice(rest)))
        value.watch(0, chosen)
        value.end_pass()
    return value.trust


def test_estimates_are_trusted_as_far_as_they_came_true() -> None:
    for seed in range(3):
        assert trust_after(seed, lasting=True) > 0.6
        assert trust_after(seed, lasting=False) < 0.25


def test_nothing_counts_as_checked_before_anything_was() -> None:
    value = SlotValue(ExpectedNextUse((EXPERTS,)), (EXPERTS,))
    assert not value.checked
    for token in range(CHECK_PASSES + 1):
        value.used(0, np.array([0]), float(token), prompt=False)
        value.replaces(VICTIM)
        value._counts.used(0, np.array([FAVOURITE.expert]), float(token))
        value.watch(0, [0])
        value.end_pass()
    assert value.checked
    believed = SlotValue(ExpectedNextUse((EXPERTS,)), (EXPERTS,), check=False)
    assert believed.checked
    assert believed.trust == 1.0


def test_other_rules_than_expected_next_use_are_valued_by_counts_of_our_own() -> None:
    value = SlotValue(Lru(), (EXPERTS,))
    value.stay_for(8.0)
    for token in range(50):
        value.used(0, np.array([0]), float(token), prompt=False)
    assert value.saved_beside(FAVOURITE, VICTIM) > 0.0
    value.replaces(FAVOURITE)
    uses, victim_uses, trust = value.worth(0)
    assert trust * (uses[VICTIM.expert] - victim_uses) < 0.0
    assert uses[FAVOURITE.expert] == victim_uses
    assert 0.0 < value.lost(2.0) < value.lost(4.0)
