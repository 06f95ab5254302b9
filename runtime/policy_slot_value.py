"""What a slot is worth to an expert: uses it is expected to save, checked against what came.

Estimates of use are hopes: with a model that routes almost at random, the expert that was just
used is no more likely to be used next than another. So every miss is compared with the victim it
would have: some passes later the uses of both are counted, and by how much the estimated
difference came true is what later differences are multiplied by. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.core import ExpertId
from runtime.eviction import Eviction, Experts
from runtime.eviction_next_use import ExpectedNextUse
from runtime.policy_windows import Worth
from runtime.use_counts import UseCounts

CHECK_PASSES = 8
CHECKS_PER_LAYER = 8
HALF_TRUSTED = 40.0
FORGET_AT = 4000.0
MOST_TRUST = 1.5
STAY, CHECK = 0, 1
"""The horizons of the counts: how long a slot keeps what it got, and until a check."""


class SlotValue:
    """Estimates uses saved by a slot over as many passes as its owner says (`stay_for`).

    `eviction` is asked who would go. Uses are estimated by the same counts where it keeps them,
    else by counts of its own. With `check` off estimates are believed as they are.
    """

    def __init__(self, eviction: Eviction, experts: Sequence[int], check: bool = True) -> None:
        self.victim: ExpertId | None = None
        self._own = not isinstance(eviction, ExpectedNextUse)
        self._counts = (
            eviction.counts if isinstance(eviction, ExpectedNextUse) else UseCounts(experts)
        )
        self.stay_for(1.0)
        self._check = check
        self._victim_uses = 0.0
        self._used = np.zeros((len(experts), max(experts)), np.int64)
        self._open: deque[_Watched] = deque()
        self._pass = 0
        self._matched, self._squared = HALF_TRUSTED / 2, HALF_TRUSTED
        self.trust = self._matched / self._squared if check else 1.0
        """How much of an estimated difference came true: least squares through the origin."""

    @property
    def checked(self) -> bool:
        """Whether estimates have been held against what came, if they are to be."""
        return not self._check or self._squared > HALF_TRUSTED

    def stay_for(self, passes: float) -> None:
        """Estimate uses over so many passes from now on."""
        self._passes = passes
        self._counts.look_ahead((passes, CHECK_PASSES))

    def used(self, layer: int, chosen: Experts, token: float, prompt: bool) -> None:
        """Note what a layer's router chose."""
        used = self._used[layer]
        used[chosen] += 1
        if self._own and not prompt:
            self._counts.used(layer, chosen, token)

    def replaces(self, victim: ExpertId | None) -> None:
        """Compare with this expert from now on; None stands for a free slot."""
        self.victim = victim
        self._victim_uses = 0.0 if victim is None else self._uses(victim, STAY)

    def watch(self, layer: int, missed: Sequence[int]) -> None:
        """Remember the first of these misses beside the victim, to count both's uses later."""
        victim = self.victim
        if victim is None or not self._check:
            return
        few = list(missed[:CHECKS_PER_LAYER])
        theirs, uses = self._uses(victim, CHECK), self._counts.uses(layer, CHECK)
        self._watch(layer, few, [float(uses[number]) - theirs for number in few], victim)

    def watch_pair(self, expert: ExpertId, victim: ExpertId) -> None:
        """Remember an expert beside its victim, to count both's uses later."""
        more = self._uses(expert, CHECK) - self._uses(victim, CHECK)
        self._watch(expert.layer, [expert.expert], [more], victim)

    def _watch(self, layer: int, experts: list[int], more: list[float], victim: ExpertId) -> None:
        used = self._used[layer]
        here = [int(used[number]) for number in experts]
        watched = _Watched(self._pass, layer, experts, here, victim, int(self._used[victim]), more)
        self._open.append(watched)

    def end_pass(self) -> None:
        """A decode pass is over: close what has been watched long enough."""
        self._pass += 1
        while self._open and self._pass - self._open[0].since_pass >= CHECK_PASSES:
            _, layer, experts, here, victim, seen, more = self._open.popleft()
            used, theirs = self._used[layer], int(self._used[victim]) - seen
            for number, before, expected in zip(experts, here, more, strict=True):
                true = int(used[number]) - before - theirs
                self._matched += expected * true
                self._squared += expected * expected
        if self._squared > FORGET_AT:
            self._matched, self._squared = self._matched / 2, self._squared / 2
        if self._check:
            self.trust = max(0.0, min(MOST_TRUST, self._matched / self._squared))

    def worth(self, layer: int) -> Worth:
        """Return the uses that a slot saves a layer's experts beyond those it costs the victim."""
        return Worth(self._counts.uses(layer, STAY), self._victim_uses, self.trust)

    def saved_beside(self, expert: ExpertId, victim: ExpertId) -> float:
        """Return the same for one expert beside a victim of its own."""
        return self.trust * (self._uses(expert, STAY) - self._uses(victim, STAY))

    def lost(self, passes: float) -> float:
        """Return the uses that the victim misses within so few passes."""
        return self._victim_uses * min(1.0, passes / self._passes)

    def _uses(self, expert: ExpertId, horizon: int) -> float:
        return float(self._counts.uses(expert.layer, horizon)[expert.expert])


class _Watched(NamedTuple):
    """Missed experts of a layer beside their victim: uses of each at that pass, and how many more
    each was expected to have than the victim by the check."""

    since_pass: int
    layer: int
    experts: list[int]
    here: list[int]
    victim: ExpertId
    seen: int
    more: list[float]
