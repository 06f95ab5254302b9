"""The simulator: deterministic, never faster than physics, and sensitive to what it models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import POLICIES, PolicyName
from runtime.link import chunk_bytes_for
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.scheduler import Costs
from runtime.simulate import Simulated, simulate
from runtime.simulate_deciding import Deciding, Step
from runtime.telemetry import Counters
from runtime.trace import ForwardPass, Guess, LayerStep, Prediction
from tests.machines import emulated_profile

LAYERS, EXPERTS, K, SIZE = 4, 16, 3, 100_000
CARD_POLICIES = [policy for policy in POLICIES if policy != "cpu-only"]


def trace_of(
    seed: int, passes: int = 40, tokens: int = 1, recall: float = 0.8
) -> list[ForwardPass]:
    """Routing with some locality: each layer prefers a few experts that drift."""
    draw = random.Random(seed)
    hot = [draw.sample(range(EXPERTS), 6) for _ in range(LAYERS)]
    trace = []
    for _ in range(passes):
        layers = []
        for layer in range(LAYERS):
            if draw.random() < 0.1:
                hot[layer][draw.randrange(6)] = draw.randrange(EXPERTS)
            pool = list(set(hot[layer]) | {draw.randrange(EXPERTS)})
            chosen = sorted(draw.sample(pool, min(K, len(pool))))
            layers.append(dict.fromkeys(chosen, tokens))
        steps = [
            LayerStep(demands, foresight(draw, layers, layer, recall))
            for layer, demands in enumerate(layers)
        ]
        trace.append(ForwardPass(tokens, tuple(steps), foresight(draw, layers, -1, recall)))
    return trace


def foresight(
    draw: random.Random, layers: list[dict[int, int]], layer: int, recall: float
) -> tuple[Prediction, ...]:
    """Guesses for the next two layers of which `recall` come true."""
    found = []
    for distance in (1, 2):
        if layer + distance < len(layers):
            true = [
                e if draw.random() < recall else draw.randrange(EXPERTS)
                for e in layers[layer + distance]
            ]
            guesses = tuple(Guess(expert, recall) for expert in sorted(set(true)))
            found.append(Prediction.of(layer + distance, distance, guesses))
    return tuple(found)


def run(
    trace: list[ForwardPass],
    policy: PolicyName,
    slots: int,
    deciding: Deciding | None = None,
    **profile: float,
) -> Simulated:
    machine = emulated_profile(**profile)
    chunk_bytes = chunk_bytes_for(machine.link_bytes_per_s.value)
    setup = PolicySetup((EXPERTS,) * LAYERS, K, (SIZE,) * LAYERS, slots, Costs.of(machine))
    made = make_policy(policy, setup)
    sizes = [SIZE] * LAYERS
    return simulate(trace, machine, made, slots, sizes, chunk_bytes, deciding=deciding)


def bound_s(trace: list[ForwardPass], counters: Counters) -> float:
    """A time that nothing may beat: the rails' own work, with no order between them."""
    machine = emulated_profile()
    link_s = counters.link_bytes_issued / machine.link_bytes_per_s.value
    cpu_s = counters.served_cpu * SIZE / machine.cpu_expert_bytes_per_s.value
    on_device = counters.routed - counters.served_cpu
    device_s = on_device * SIZE / machine.device_bytes_per_s.value
    device_s += len(trace) * LAYERS * machine.device_layer_s.value
    return max(link_s, cpu_s, device_s)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CARD_POLICIES), st.integers(1, LAYERS * EXPERTS))
def test_every_run_closes_repeats_and_respects_the_bound(
    seed: int, policy: PolicyName, slots: int
) -> None:
    trace = trace_of(seed)
    first, second = run(trace, policy, slots), run(trace, policy, slots)
    assert first == second
    c = first.counters
    assert sum(c.served) == c.routed == sum(len(step.demands) for p in trace for step in p.layers)
    settled = c.link_bytes_on_demand + c.link_bytes_prefetch_used + c.link_bytes_prefetch_late
    settled += c.link_bytes_prefetch_wasted + c.link_bytes_cancelled
    assert c.link_bytes_issued == settled + c.link_bytes_pending
    assert first.total_s >= bound_s(trace, c)


@pytest.mark.parametrize("policy", CARD_POLICIES)
def test_deciding_is_charged_where_it_happens(policy: PolicyName) -> None:
    trace = trace_of(3)
    free = run(trace, policy, 24)
    assert run(trace, policy, 24, Deciding()) == free
    before_the_work, beside_it = 2e-3, 1e-6
    slow = run(trace, policy, 24, Deciding(Step(before_the_work)))
    layers = len(trace) * LAYERS
    # Demands on the link may be hidden behind it, the device's work may not.
    assert slow.total_s > free.total_s + 0.3 * layers * before_the_work
    hidden = run(trace, policy, 24, Deciding(ahead=Step(beside_it), done=Step(expert_s=beside_it)))
    assert free.total_s * 0.9 < hidden.total_s < slow.total_s


def test_more_slots_give_more_hits_and_a_faster_run() -> None:
    trace = trace_of(3, passes=120)
    runs = [run(trace, "on-demand", slots) for slots in (4, 16, 32, LAYERS * EXPERTS)]
    hits = [result.counters.hit_rate for result in runs]
    assert hits == sorted(hits)
    times = [result.total_s for result in runs]
    assert times == sorted(times, reverse=True)


def test_a_faster_link_helps_only_who_uses_it() -> None:
    trace = trace_of(4)
    slow, fast = (run(trace, "on-demand", 12, link_bytes_per_s=r) for r in (30e6, 120e6))
    assert fast.total_s < slow.total_s
    placed = [run(trace, "cpu-only", 12, link_bytes_per_s=rate).total_s for rate in (30e6, 120e6)]
    assert placed[0] == placed[1]


def test_hybrid_is_at_least_as_fast_as_either_rail_alone() -> None:
    trace = trace_of(5, passes=150)
    hybrid = run(trace, "hybrid", 16).total_s
    assert hybrid < run(trace, "on-demand", 16).total_s
    assert hybrid < run(trace, "cpu-miss", 16).total_s


def test_a_prompt_that_needs_more_experts_than_slots_is_served_in_waves() -> None:
    everyone = {expert: 5 for expert in range(EXPERTS)}
    trace = [ForwardPass(27, (LayerStep(everyone),) * LAYERS, span=27)]
    counters = run(trace, "on-demand", 2).counters
    assert counters.served_on_demand == LAYERS * EXPERTS
    assert counters.evictions == LAYERS * EXPERTS - 2


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "prescope"])
def test_host_time_is_charged_once_per_layer(policy: PolicyName) -> None:
    trace = trace_of(6)
    lean, heavy = (
        run(trace, policy, LAYERS * EXPERTS, host_layer_s=host_s).total_s for host_s in (0.0, 0.01)
    )
    assert heavy - lean == pytest.approx(len(trace) * LAYERS * 0.01, rel=0.02)


def test_prescope_uses_host_time_to_copy_ahead() -> None:
    trace = trace_of(6, passes=100)
    lean, heavy = (run(trace, "prescope", 20, host_layer_s=s) for s in (0.0, 0.002))
    charged_s = len(trace) * LAYERS * 0.002
    assert heavy.total_s - lean.total_s < charged_s
    assert heavy.counters.served_prefetch_in_time > lean.counters.served_prefetch_in_time


def test_sequences_with_forwards_of_their_own_pay_for_them_apart() -> None:
    machine = emulated_profile()
    trace = trace_of(6, passes=20, tokens=4)
    apart = [replace(forward, forwards=4) for forward in trace]
    once, four = run(trace, "on-demand", EXPERTS), run(apart, "on-demand", EXPERTS)
    dense_s = machine.device_layer_s.value * (3 - 3 / machine.device_tokens_per_pass.value)
    more_s = machine.host_layer_s.value * 3 + dense_s
    assert four.total_s - once.total_s == pytest.approx(len(trace) * LAYERS * more_s, rel=1e-4)
