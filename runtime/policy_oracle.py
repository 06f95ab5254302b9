"""The policy `oracle`: PreScope's plans with the whole routing trace known beforehand.

Offline-optimal eviction with bypass and predictions that are always right, on the same rails. A
strong heuristic, not a bound: its split and its order of copies are PreScope's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.core import ExpertId, PolicyName
from runtime.offline import NEVER, OfflineOptimal
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.policy_prescope import PreScope
from runtime.policy_windows import Worth
from runtime.scheduler import MissPlan
from runtime.trace import ForwardPass, Guess, Prediction


class Oracle(PreScope):
    """Made for one trace and used for it from its first pass on."""

    name: PolicyName = "oracle"

    def __init__(self, passes: Sequence[ForwardPass], setup: PolicySetup) -> None:
        super().__init__(setup)
        self._future = OfflineOptimal(passes)
        self.eviction = self._future
        self._passes = passes
        self._pass = -1
        self._compare_every, self._most_rests = 1, 0  # what it costs to think is no matter here

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        self._pass += 1
        return super().begin_pass(self._truth(-1), moment)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        self._future.at(self._pass, routed.layer)
        return super().place(routed, moment)

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        return super().beside(routed, plan, self._truth(routed.layer), moment)

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        return self._future.next_use(wish.expert) < self._future.next_use(victim)

    def _worth(self, layer: int) -> Worth:
        next_use, victim = self._future.next_use, self._value.victim
        theirs = NEVER if victim is None else next_use(victim)
        everyone = range(self._setup.experts[layer])
        sooner = [float(next_use(ExpertId(layer, each)) < theirs) for each in everyone]
        return Worth(np.array(sooner), 0.0, 1.0)

    def _truth(self, layer: int) -> tuple[Prediction, ...]:
        layers = self._passes[self._pass].layers
        return tuple(
            Prediction.of(
                layer + distance,
                distance,
                [Guess(expert, 1.0) for expert in layers[layer + distance].demands],
            )
            for distance in (1, 2)
            if layer + distance < len(layers)
        )
