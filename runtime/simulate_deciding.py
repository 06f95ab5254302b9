"""What deciding costs the host in a simulated run: seconds per layer and per routed expert.

In the engine the thread that runs the model also decides. Until a layer's own work is ordered the
device waits for it; copies ahead are weighed and lessons learned while the device computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cache import CacheTable
from runtime.policy import Moment, Policy
from runtime.residency import Residency
from runtime.residency_layer import Steps
from runtime.telemetry import Counters
from runtime.timeline import Timeline
from runtime.trace import LayerStep


@dataclass(frozen=True)
class Step:
    """Seconds of one step of deciding: `base_s`, and `expert_s` more per routed expert."""

    base_s: float = 0.0
    expert_s: float = 0.0

    def seconds(self, experts: int) -> float:
        return self.base_s + experts * self.expert_s


@dataclass(frozen=True)
class Deciding:
    """What deciding a layer takes: until its work is ordered, copies ahead, and at its end."""

    routed: Step = Step()
    ahead: Step = Step()
    done: Step = Step()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Deciding:
        return cls(*(Step(**value[name]) for name in ("routed", "ahead", "done")))


class PacedResidency(Residency):
    """A residency whose decisions take the modelled host's time."""

    def __init__(
        self,
        cache: CacheTable,
        policy: Policy,
        layer_bytes: Sequence[int],
        counters: Counters,
        timeline: Timeline,
        deciding: Deciding,
    ) -> None:
        super().__init__(cache, policy, layer_bytes, counters)
        self._timeline = timeline
        self._deciding = deciding
        self._experts = 0

    def routed(self, layer: int, step: LayerStep, moment: Moment) -> Steps:
        steps = super().routed(layer, step, moment)
        self._experts = len(step.demands)
        self._charge(self._deciding.routed)
        return steps

    def ahead(self) -> Steps:
        steps = super().ahead()
        self._charge(self._deciding.ahead)
        return steps

    def layer_done(self, moment: Moment) -> Steps:
        steps = super().layer_done(moment)
        self._charge(self._deciding.done)
        return steps

    def _charge(self, step: Step) -> None:
        self._timeline.host_s += step.seconds(self._experts)
