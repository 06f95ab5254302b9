"""Tokens per second before anything is loaded: the simulator on routing like that of known models.

The same simulator, policies and synthetic chats as `bench policies`. The statistics are those of
the published table whose shape is nearest; the machine's clock is virtual. Pure: nothing here is
measured, and the band says only how far the chats drawn and the host's time per layer move it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from runtime.core import ExpertId, HardwareProfile, MemoryPlan, ModelShape, PolicyName, Reading
from runtime.machines import HOST_LAYER_S
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.ram_tier import READS_IN_FLIGHT, RamTier
from runtime.scheduler import Costs
from runtime.simulate import simulate
from runtime.synthetic import STATISTICS, RoutingStatistics, synthetic_trace
from runtime.trace import ForwardPass

SIMULATED_LAYERS = 12
SEEDS = (1, 2, 3)
EARLIER_PASSES, PROMPT_TOKENS, SETTLING_PASSES, MEASURED_PASSES = 16, 256, 8, 32
COLLECTED_PASSES = 48
_COLLECTED_SEED = 1000
_COPY_S = 100e-6


@dataclass(frozen=True)
class Throughput:
    """Decoding one chat: tokens/s with the lowest and highest of all runs, and where from.

    `hit_rate` is the share of expert uses that found theirs in a slot, `disk_bytes_per_token` what
    the disk reads where RAM is too small.
    """

    tokens_per_s: float
    low_tokens_per_s: float
    high_tokens_per_s: float
    hit_rate: float
    disk_bytes_per_token: float
    routing: str
    origin: str


@dataclass(frozen=True)
class _Run:
    tokens_per_s: float
    hit_rate: float
    disk_bytes: float


def foretell(
    shape: ModelShape,
    plan: MemoryPlan,
    profile: HardwareProfile,
    policy: PolicyName = "prescope",
    seeds: Sequence[int] = SEEDS,
) -> Throughput:
    """Simulate decoding on the machine of `profile` with the slots of `plan`.

    `plan` without slots computes in place. The profile's `device_layer_s` is replaced by what
    reading the dense weights takes; unless its `host_layer_s` was measured, the band covers all
    of `machines.HOST_LAYER_S`.
    """
    dense_s = shape.dense_bytes / shape.layers / profile.device_bytes_per_s.value
    profile = replace(profile, device_layer_s=Reading(dense_s, "assumed"))
    hosts = [profile.host_layer_s.value]
    if profile.host_layer_s.source == "assumed":
        hosts = sorted({*hosts, *HOST_LAYER_S})
    statistics = nearest(shape)
    if not plan.slots:
        policy = "cpu-only"

    def run(seed: int, host_s: float) -> _Run:
        on = replace(profile, host_layer_s=replace(profile.host_layer_s, value=host_s))
        return _run(shape, plan, on, policy, statistics, seed)

    usual = {seed: run(seed, profile.host_layer_s.value) for seed in seeds}
    by_speed = sorted(usual, key=lambda seed: usual[seed].tokens_per_s)
    middle = usual[by_speed[len(by_speed) // 2]]
    # The slowest chat on the slowest host and the fastest on the fastest: the ends of the band.
    ends = [run(by_speed[0], hosts[-1]), run(by_speed[-1], hosts[0])]
    speeds = [run.tokens_per_s for run in (*usual.values(), *ends)]
    return Throughput(
        middle.tokens_per_s,
        min(speeds),
        max(speeds),
        middle.hit_rate,
        middle.disk_bytes,
        statistics.name,
        _origin(shape, plan, profile, statistics, len(seeds), hosts),
    )


def nearest(shape: ModelShape) -> RoutingStatistics:
    """Return the statistics of the known model with the most similar experts, in this shape.

    Similar: the share of experts that a token uses, and how many there are, in logarithms.
    """
    experts = max(shape.experts)

    def distance(statistics: RoutingStatistics) -> float:
        share = statistics.top_k / statistics.experts * experts / shape.top_k
        return abs(math.log(share)) + abs(math.log(statistics.experts / experts))

    found = min(STATISTICS.values(), key=distance)
    layers = min(shape.layers, SIMULATED_LAYERS)
    return replace(found, layers=layers, experts=experts, top_k=min(shape.top_k, experts))


def _run(
    shape: ModelShape,
    plan: MemoryPlan,
    profile: HardwareProfile,
    policy: PolicyName,
    statistics: RoutingStatistics,
    seed: int,
) -> _Run:
    layers = statistics.layers
    scale = shape.layers / layers
    # Rounded down, but a layer's top-k must have its place here too.
    slots = max(int(plan.slots / scale), min(statistics.top_k, plan.slots))
    experts = (statistics.experts,) * layers
    layer_bytes = (shape.expert_bytes,) * layers
    setup = PolicySetup(experts, statistics.top_k, layer_bytes, slots, Costs.of(profile))
    passes, warm = _session(statistics, seed)
    most_used = _most_used(statistics, seed)
    chosen = make_policy(policy, setup)
    chunk_bytes = max(1 << 16, int(profile.link_bytes_per_s.value * _COPY_S) // 64 * 64)
    simulated = simulate(
        passes,
        profile,
        chosen,
        slots,
        layer_bytes,
        chunk_bytes,
        predictor_bytes=shape.predictor_bytes // max(1, shape.layers),
        warm_passes=warm,
        preload=most_used[:slots],
        ram=_ram(plan, layer_bytes, most_used, slots, scale),
    )
    counted = simulated.measured
    token_s = simulated.measured_s * scale / (len(passes) - warm)
    disk_bytes = counted.disk_bytes * scale / (len(passes) - warm)
    return _Run(1.0 / token_s, counted.hit_rate, disk_bytes)


def _ram(
    plan: MemoryPlan,
    layer_bytes: Sequence[int],
    most_used: Sequence[ExpertId],
    slots: int,
    scale: float,
) -> RamTier | None:
    """Return RAM with as many experts as the plan lets it hold, those that no slot holds first.

    It is filled as after some use; None where it holds all.
    """
    if plan.ram_experts is None:
        return None
    places = max(int(plan.ram_experts / scale), min(READS_IN_FLIGHT, len(most_used)))
    ram = RamTier(layer_bytes, places)
    for expert in [*most_used[slots:], *most_used[:slots]][:places]:
        ram.place(expert)
    return ram


@lru_cache(maxsize=8)
def _session(statistics: RoutingStatistics, seed: int) -> tuple[tuple[ForwardPass, ...], int]:
    """Return the passes of two chats, and how many come before the measured tokens."""
    earlier = synthetic_trace(statistics, seed=10 * seed, passes=EARLIER_PASSES)
    chat = synthetic_trace(
        statistics,
        seed=10 * seed + 1,
        passes=SETTLING_PASSES + MEASURED_PASSES,
        prompt_tokens=PROMPT_TOKENS,
    )
    passes = (*earlier.passes, *chat.passes)
    return passes, len(passes) - MEASURED_PASSES


@lru_cache(maxsize=8)
def _most_used(statistics: RoutingStatistics, seed: int) -> tuple[ExpertId, ...]:
    """Return all experts, those first that other chats used most: the slots are filled at load."""
    uses: Counter[ExpertId] = Counter()
    chat = synthetic_trace(
        statistics, seed=_COLLECTED_SEED + seed, passes=COLLECTED_PASSES, predictions=False
    )
    for forward in chat.passes:
        for layer, step in enumerate(forward.layers):
            uses.update({ExpertId(layer, expert): n for expert, n in step.demands.items()})
    ids = [ExpertId(layer, e) for layer in range(statistics.layers) for e in range(chat.experts[0])]
    return tuple(sorted(ids, key=lambda expert: -uses[expert]))


def _origin(
    shape: ModelShape,
    plan: MemoryPlan,
    profile: HardwareProfile,
    statistics: RoutingStatistics,
    seeds: int,
    hosts: Sequence[float],
) -> str:
    known = STATISTICS[statistics.name]
    like = f"routing like {known.name} ({known.experts} experts, {known.top_k} per token)"
    if (known.experts, known.top_k) != (max(shape.experts), shape.top_k):
        like += f", scaled to {max(shape.experts)} and {shape.top_k}"
    if plan.ram_experts is not None:
        like += f", a disk of {profile.disk_bytes_per_s.value / 1e9:.1f} GB/s"
    spread = f"{seeds} drawn chats"
    if len(hosts) > 1:
        spread += f" and {hosts[0] * 1e6:.0f} to {hosts[-1] * 1e6:.0f} us of host time per layer"
    return (
        f"modelled, not measured: simulated decoding of one chat, {like};"
        f" the band is the lowest and highest of {spread}"
    )
