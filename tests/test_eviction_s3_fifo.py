"""S3-FIFO against its published pseudocode, and what it adds to that: who must stay, prefetches."""

from __future__ import annotations

import random

import pytest

from runtime.core import ExpertId
from runtime.eviction_s3_fifo import S3Fifo
from tests.eviction_ledger import ALL, SEEDS, Ledger, replay, script


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
