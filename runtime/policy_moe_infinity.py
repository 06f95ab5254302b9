"""The policy `moe-infinity`: request-level activation tracing, its prefetching and its eviction.

As the paper has it (arXiv 2401.14361), see `runtime.activation_tracing`: misses are loaded on
demand, experts of later layers are copied ahead by predicted activation ratio times proximity.
Requests are told apart by their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.activation_tracing import MoeInfinityTracer
from runtime.activation_tracing_eviction import ActivationEviction
from runtime.controller import FULL
from runtime.core import ExpertId, PolicyName
from runtime.eviction import Eviction
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.scheduler import MissPlan
from runtime.trace import Prediction

LAYERS_QUEUED = 2
"""Prefetches wait in the queue for so many layers' worth of experts, newly ranked every layer."""


class MoeInfinity:
    """One per model; the engine thread owns it. `tracer` may bring a collection of old requests."""

    name: PolicyName = "moe-infinity"
    predicts = False
    copies_ahead = True

    def __init__(self, setup: PolicySetup, tracer: MoeInfinityTracer | None = None) -> None:
        self.tracer = tracer or MoeInfinityTracer(setup.layers, max(setup.experts))
        self.eviction: Eviction = ActivationEviction(self.tracer)
        self.look_ahead = FULL
        self._most = LAYERS_QUEUED * setup.top_k
        self._prompt = False
        self.tracer.begin_request()

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        if moment.prompt and not self._prompt:
            self.tracer.end_request()
        self._prompt = moment.prompt
        self.tracer.begin_pass(prompt=moment.prompt)
        return self._wishes(-1, moment)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        self.tracer.routed(routed.layer, routed.tokens)
        return MissPlan(tuple(routed.misses), ())

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        return self._wishes(routed.layer, moment)

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        return ()

    def note_link(self, moved_bytes: int, busy_s: float) -> None:
        """The paper plans by activations, not by rates."""

    def note_cpu(self, seconds: float) -> None:
        """Nothing runs on the CPU."""

    def protects(self, expert: ExpertId) -> bool:
        return False

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        reuse = self.tracer.reuse()
        return bool(reuse[wish.expert] > reuse[victim])

    def _wishes(self, layer: int, moment: Moment) -> list[Wish]:
        """Rank what later layers need and queue it, the most urgent first."""
        room = self._most - len(moment.queue.unstarted)
        if not self.look_ahead or room <= 0:
            return []
        ranked = self.tracer.ranked(layer, 4 * self._most)
        missing = [(expert, urgency) for expert, urgency in ranked if not moment.holds(expert)]
        return [
            Wish(expert, moment.now_s + 1.0 - urgency, 0.0) for expert, urgency in missing[:room]
        ]
