"""Everything an eviction rule was told, kept as it came, and stories to tell it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from runtime.core import ExpertId
from runtime.eviction import Eviction
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
