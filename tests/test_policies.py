"""What each policy promises beyond what all of them do: prescope above all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest

from runtime import (
    calibration,
    eviction_next_use,
    policy_prescope,
    policy_windows,
    scheduler,
    use_counts,
)
from runtime.cache import NOBODY
from runtime.core import ExpertId, PolicyName, Reading
from runtime.errors import ConfigError
from runtime.link import chunk_bytes_for
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.policy_prescope import PreScope
from runtime.policy_table import make_oracle, make_policy
from runtime.scheduler import Costs
from runtime.simulate import Simulated, simulate
from runtime.trace import ForwardPass, Guess, LayerStep, Prediction
from runtime.transfer_queue import QueueState
from tests.machines import emulated_profile
from tests.test_simulate import EXPERTS, LAYERS, SIZE, K, trace_of

MACHINE = emulated_profile()


def setup_of(slots: int, profile: Any = MACHINE) -> PolicySetup:
    return PolicySetup((EXPERTS,) * LAYERS, K, (SIZE,) * LAYERS, slots, Costs.of(profile))


def run(
    passes: list[ForwardPass],
    name: PolicyName,
    slots: int = 14,
    profile: Any = MACHINE,
    **settings: Any,
) -> Simulated:
    setup = setup_of(slots, profile)
    policy = (
        make_oracle(passes, setup) if name == "oracle" else make_policy(name, setup, **settings)
    )
    chunk_bytes = chunk_bytes_for(profile.link_bytes_per_s.value)
    sizes = setup.layer_bytes
    return simulate(passes, profile, policy, slots, sizes, chunk_bytes, warm_passes=20)


def routed_of(
    layer: int,
    hits: Sequence[int] = (),
    coming: Sequence[int] = (),
    misses: Sequence[int] = (),
    tokens: int = 1,
) -> Routed:
    chosen = sorted([*hits, *coming, *misses])
    demands = dict.fromkeys(chosen, tokens)
    return Routed(layer, demands, np.array(chosen, np.int64), hits, coming, misses)


def moment(**changes: Any) -> Moment:
    still = Moment(
        5.0, 1, False, 0.0, 0.0, QueueState(0.0), 0, lambda layer: (), lambda layer: NOBODY
    )
    return still._replace(**changes)


def test_unknown_policies_and_policies_without_slots_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        make_policy("nonsense", setup_of(4))
    with pytest.raises(ConfigError, match="needs expert slots"):
        make_policy("prescope", setup_of(0))


def test_static_split_keeps_the_first_layers_and_never_evicts() -> None:
    result = run(trace_of(2, passes=80), "static-split", slots=EXPERTS + 5)
    assert result.counters.evictions == 0
    assert result.measured.link_bytes_on_demand <= EXPERTS * SIZE
    assert result.measured.served_cpu > 0


def test_layer_stream_moves_whole_layers_that_do_not_fit() -> None:
    passes = trace_of(2, passes=30)
    result = run(passes, "layer-stream", slots=2 * EXPERTS)
    measured = result.measured
    assert measured.served_cpu == 0
    moved = measured.link_bytes_on_demand / SIZE / 10
    streamed = EXPERTS * (LAYERS - 1)
    assert streamed * 0.8 <= moved <= streamed + 1, "and hardly anything for the layer that stays"


def test_foresight_helps_the_more_the_better_it_is() -> None:
    times = [
        run(trace_of(5, passes=150, recall=recall), "prescope").measured_s
        for recall in (0.0, 0.5, 0.95)
    ]
    assert times[2] < times[1] < times[0]
    blind = run(trace_of(5, passes=150), "prescope", prefetch=False).measured_s
    assert times[2] < 0.97 * blind


def test_a_predictor_that_is_always_wrong_costs_next_to_nothing() -> None:
    """Its guesses are found out, and then nothing is copied for them."""
    passes = trace_of(5, passes=300, recall=0.0)
    wrong = [
        replace(
            forward,
            predictions=tuple(map(never_true, forward.predictions, [forward] * 9)),
            layers=tuple(
                replace(step, predictions=tuple(never_true(p, forward) for p in step.predictions))
                for step in forward.layers
            ),
        )
        for forward in passes
    ]
    misled = run(wrong, "prescope")
    blind = run(wrong, "prescope", prefetch=False)
    assert misled.measured_s < 1.03 * blind.measured_s
    assert misled.measured.prefetches < 0.2 * len(passes) * LAYERS


def never_true(prediction: Prediction, forward: ForwardPass) -> Prediction:
    chosen = forward.layers[prediction.layer].demands
    wrong = [expert for expert in range(EXPERTS) if expert not in chosen][:K]
    guesses = [Guess(expert, 0.9) for expert in wrong]
    return Prediction.of(prediction.layer, prediction.distance, guesses)


def test_the_oracle_is_faster_than_who_has_to_guess() -> None:
    passes = trace_of(9, passes=150, recall=0.8)
    oracle = run(passes, "oracle").measured_s
    for name in ("prescope", "hybrid", "on-demand", "cpu-miss"):
        assert oracle < run(passes, name).measured_s


def test_prescope_is_not_slower_than_its_rivals_on_any_of_these_machines() -> None:
    passes = trace_of(11, passes=200, recall=0.8)
    for link, cpu in ((30e6, 110e6), (50e6, 110e6), (150e6, 60e6)):
        profile = emulated_profile(link_bytes_per_s=link, cpu_bytes_per_s=cpu)
        ours = run(passes, "prescope", profile=profile).measured_s
        for name in ("hybrid", "on-demand", "cpu-miss", "static-split", "moe-infinity"):
            theirs = run(passes, name, profile=profile).measured_s
            assert ours < 1.02 * theirs, (link, cpu, name)


def test_what_is_foreseen_is_protected_until_its_layer_is_done() -> None:
    policy = PreScope(setup_of(8))
    soon = (Prediction.of(1, 1, (Guess(3, 0.9), Guess(4, 0.05))),)
    routed = routed_of(0)
    plan = policy.place(routed, moment())
    policy.beside(routed, plan, soon, moment())
    assert policy.protects(ExpertId(1, 3))
    assert not policy.protects(ExpertId(1, 4))
    assert not policy.protects(ExpertId(2, 3))
    policy.place(routed_of(1), moment())
    assert policy.protects(ExpertId(1, 3))
    policy.between(1, moment())
    assert not policy.protects(ExpertId(1, 3))


def test_a_wish_does_not_displace_what_is_used_in_every_pass() -> None:
    policy = PreScope(setup_of(8))
    often, never, guessed = ExpertId(0, 1), ExpertId(0, 2), ExpertId(1, 3)
    for token in range(200):
        policy.eviction.used(often, float(token))
    late = moment(token=199.0)
    assert not policy.displaces(Wish(guessed, 0.0, 0.4), often, late)
    assert policy.displaces(Wish(guessed, 0.0, 0.4), never, late)


def test_an_expert_that_is_nearly_here_is_waited_for_and_one_that_is_not_is_computed() -> None:
    """A copy under way beats the CPU only while little of it is left."""
    profile = emulated_profile(link_bytes_per_s=50e6, cpu_bytes_per_s=110e6)
    copy_s = SIZE / 50e6
    for left, expected in ((0.05, ()), (0.95, (2,))):
        policy = PreScope(setup_of(8, profile))
        queue = QueueState(copy_s * 0.02, left_bytes={ExpertId(0, 2): int(SIZE * left)})
        plan = policy.place(routed_of(0, coming=[2]), moment(queue=queue))
        assert plan.cpu == expected
        assert plan.load == ()


def test_prescope_copies_nothing_for_layers_that_do_not_exist() -> None:
    passes = trace_of(3, passes=5)
    last = passes[-1].layers[-1]
    beyond = replace(last, predictions=(Prediction.of(LAYERS, 1, (Guess(0, 0.99),)),))
    passes[-1] = replace(passes[-1], layers=(*passes[-1].layers[:-1], beyond))
    run(passes, "prescope")


def test_a_prompt_streams_the_next_layer_while_this_one_is_computed() -> None:
    everyone = LayerStep({expert: 60 for expert in range(EXPERTS)}, recency={})
    prompt = [ForwardPass(320, (everyone,) * LAYERS, span=320)] * 22
    ours, hybrid = run(prompt, "prescope", slots=24), run(prompt, "hybrid", slots=24)
    assert ours.measured_s <= hybrid.measured_s
    assert ours.measured.served_prefetch_in_time > 0


def test_an_idle_link_brings_in_what_will_be_used_again_and_keeps_it() -> None:
    """Where a copy takes longer than the CPU pauses, nothing can be copied ahead in time."""
    passes = trace_of(5, passes=300, recall=0.5)
    slow = emulated_profile(link_bytes_per_s=12e6, cpu_bytes_per_s=100e6)
    slow = replace(slow, cpu_expert_bytes_per_s_while_copying=Reading(90e6, "emulated"))
    admits, without = (run(passes, "prescope", profile=slow, admit=on) for on in (True, False))
    assert admits.measured.hit_rate > without.measured.hit_rate + 0.05
    assert admits.measured_s < without.measured_s
    used, wasted = (
        admits.measured.link_bytes_prefetch_used,
        admits.measured.link_bytes_prefetch_wasted,
    )
    assert used > 4 * wasted


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is compiled as the Python that it is written in, so that its lines count."""
    counted = (calibration, eviction_next_use, policy_windows, scheduler, use_counts)
    for module in (*counted, policy_prescope):
        for name, value in vars(module).items():
            if hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)


def lines_run(experts: int) -> int:
    """Return how many lines of ours one layer's plans take with this many experts.

    Half of them are hits and half misses, one is coming, all are guessed for both layers ahead.
    """
    layers = 4
    sizes = (SIZE,) * layers
    policy = PreScope(PolicySetup((experts,) * layers, K, sizes, experts, Costs.of(MACHINE)))
    everyone = list(range(experts))
    for number in range(experts):
        policy.eviction.used(ExpertId(0, number), 0.0)
        policy.eviction.admitted(ExpertId(1, number), 0.0, prefetched=False)
    half = experts // 2
    routed = routed_of(0, everyone[1:half], everyone[:1], everyone[half:], tokens=2)
    guesses = tuple(Guess(number, 0.5 + 0.4 * number / experts) for number in range(experts))
    soon = (Prediction.of(1, 1, guesses), Prediction.of(2, 2, guesses))
    queue = QueueState(0.001, left_bytes={ExpertId(0, 0): SIZE // 2})
    now = moment(tokens=64, queue=queue)
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if "runtime" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    policy.begin_pass((), now)
    sys.settrace(trace)
    try:
        plan = policy.place(routed, now)
        policy.beside(routed, plan, soon, now)
        policy.between(0, now)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.usefixtures("interpreted")
def test_a_layers_plan_takes_steps_in_proportion_to_its_experts() -> None:
    steps = {experts: lines_run(experts) for experts in (32, 128, 512)}
    assert steps[32] > 10 * 32, "the compiled loops count as well"
    assert steps[128] < 4.6 * steps[32]
    assert steps[512] < 4.6 * steps[128]
