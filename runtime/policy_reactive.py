"""The policies without foresight: what the engines that people use today do with a miss.

Each is the rule of a known engine on this substrate, where hits never wait for a copy and every
rail runs beside the others; so they are at least as fast here as where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from runtime.core import ExpertId, PolicyName
from runtime.eviction import Eviction, Experts, Floats
from runtime.eviction_lru import Lru
from runtime.eviction_table import make_eviction
from runtime.policy import Moment, PolicySetup, Reactive, Routed
from runtime.scheduler import MissPlan, split_by_share, split_least_makespan


def _everyone(routed: Routed) -> tuple[int, ...]:
    return tuple(routed.misses)


class OnDemand(Reactive):
    """Load every miss into a cache: the class of Mixtral-offloading (arXiv 2312.17238)."""

    name: PolicyName = "on-demand"

    def __init__(self, setup: PolicySetup, eviction: str = "lru") -> None:
        self.eviction = make_eviction(eviction, setup.experts)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        return MissPlan(_everyone(routed), ())


class CpuOnly(Reactive):
    """Compute everything on the CPU."""

    name: PolicyName = "cpu-only"

    def __init__(self, setup: PolicySetup) -> None:
        self.eviction: Eviction = Lru()

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        return MissPlan((), _everyone(routed))


class CpuMiss(Reactive):
    """Fill the slots with what comes first and compute every later miss on the CPU: Fiddler
    (arXiv 2402.07033), llama.cpp `--cpu-moe`."""

    name: PolicyName = "cpu-miss"

    def __init__(self, setup: PolicySetup) -> None:
        self.eviction: Eviction = Lru()

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        misses = _everyone(routed)
        room = min(moment.free_slots, len(misses))
        return MissPlan(misses[:room], misses[room:])


class StaticSplit(Reactive):
    """The first layers' experts resident, those of the others on the CPU: llama.cpp
    `--n-cpu-moe`, LM Studio. The layer where slots end has as many as are left."""

    name: PolicyName = "static-split"

    def __init__(self, setup: PolicySetup) -> None:
        self.eviction: Eviction = Lru()
        self._resident: list[int] = []
        left = setup.slots
        for count in setup.experts:
            self._resident.append(min(count, left))
            left -= min(count, left)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        kept = self._resident[routed.layer]
        load = tuple(expert for expert in routed.misses if expert < kept)
        cpu = tuple(expert for expert in routed.misses if expert >= kept)
        return MissPlan(load, cpu)


class _Streamed(Lru):
    """Least recently used of the layers that do not stay: those that do are never asked for."""

    def __init__(self, stays: Sequence[bool]) -> None:
        super().__init__()
        self._stays = stays

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        if not self._stays[expert.layer]:
            super().used(expert, now, weight)

    def used_all(
        self, layer: int, experts: Experts, now: float, weights: Floats | None = None
    ) -> None:
        if not self._stays[layer]:
            super().used_all(layer, experts, now, weights)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        if not self._stays[expert.layer]:
            super().admitted(expert, now, prefetched=prefetched)

    def removed(self, expert: ExpertId) -> None:
        if not self._stays[expert.layer]:
            super().removed(expert)


class LayerStream(Reactive):
    """Layers that fit stay; the others are copied whole, every expert, as they come: accelerate's
    `device_map` offload. At least one layer's slots are kept for streaming."""

    name: PolicyName = "layer-stream"

    def __init__(self, setup: PolicySetup) -> None:
        self._experts = setup.experts
        left = setup.slots - max(setup.experts)
        self._stays = []
        for count in setup.experts:
            left -= count
            self._stays.append(left >= 0)
        self.eviction: Eviction = _Streamed(self._stays)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        load = _everyone(routed)
        if self._stays[routed.layer]:
            return MissPlan(load, ())
        return MissPlan(load, (), tuple(range(self._experts[routed.layer])))

    def protects(self, expert: ExpertId) -> bool:
        return self._stays[expert.layer]


class Hybrid(Reactive):
    """Split misses between link and CPU by measured rates while both run; what was fetched stays:
    FreeToken (arXiv 2608.16157).

    `split` is "makespan" with all constants, or "share", FreeToken's own rule. Among equals the
    expert worth most in the cache is fetched.
    """

    name: PolicyName = "hybrid"

    def __init__(
        self,
        setup: PolicySetup,
        split: Literal["makespan", "share"] = "makespan",
        eviction: str = "lru",
    ) -> None:
        self.eviction = make_eviction(eviction, setup.experts)
        self._setup = setup
        self._by_share = split == "share"

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        layer, costs, misses = routed.layer, self._setup.costs, routed.misses
        value = self.eviction.worth
        worth = [value(ExpertId(layer, expert), moment.token, layer) for expert in misses]
        if self._by_share:
            return split_by_share(misses, costs, worth)
        size = self._setup.layer_bytes[layer]
        ahead_s = max(0.0, moment.queue.stream_free_s - moment.now_s)
        ahead_s += moment.queue.demanded_bytes / costs.link_bytes_per_s
        tokens = [routed.tokens[expert] for expert in misses]
        return split_least_makespan(misses, tokens, size, costs, ahead_s, worth=worth).plan
