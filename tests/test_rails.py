"""A rail that is slower than promised loses work, and gets it back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.core import HardwareProfile, Reading
from runtime.link import chunk_bytes_for
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.rails import Rail, Rails
from runtime.scheduler import Costs
from runtime.simulate import Simulated, simulate
from tests.machines import emulated_profile
from tests.test_simulate import EXPERTS, LAYERS, SIZE, K, trace_of

FAST_LINK = emulated_profile(link_bytes_per_s=200e6, cpu_bytes_per_s=60e6)
FAST_CPU = emulated_profile(link_bytes_per_s=60e6, cpu_bytes_per_s=200e6)


def slower(promised: HardwareProfile, link: float = 1.0, cpu: float = 1.0) -> HardwareProfile:
    def by(reading: Reading, factor: float) -> Reading:
        return Reading(reading.value / factor, reading.source)

    return replace(
        promised,
        link_bytes_per_s=by(promised.link_bytes_per_s, link),
        cpu_expert_bytes_per_s=by(promised.cpu_expert_bytes_per_s, cpu),
        cpu_expert_bytes_per_s_while_copying=by(promised.cpu_expert_bytes_per_s_while_copying, cpu),
    )


def run(promised: HardwareProfile, real: HardwareProfile) -> Simulated:
    """Plan with the promised machine on the real one."""
    sizes, slots = (SIZE,) * LAYERS, 14
    policy = make_policy(
        "prescope", PolicySetup((EXPERTS,) * LAYERS, K, sizes, slots, Costs.of(promised))
    )
    chunk_bytes = chunk_bytes_for(promised.link_bytes_per_s.value)
    return simulate(trace_of(8, passes=150), real, policy, slots, sizes, chunk_bytes)


@pytest.mark.parametrize(
    ("promised", "real", "rail"),
    [
        (FAST_LINK, slower(FAST_LINK, link=8), "served_on_demand"),
        (FAST_CPU, slower(FAST_CPU, cpu=12), "served_cpu"),
    ],
    ids=["link", "CPU"],
)
def test_a_slow_rail_is_given_less_and_the_layer_ends_sooner(
    promised: HardwareProfile, real: HardwareProfile, rail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heeding = run(promised, real)
    with monkeypatch.context() as patch:
        patch.setattr(Rail, "note", lambda self, least_s, most_s, seconds: None)
        deaf = run(promised, real)
    assert heeding.total_s < deaf.total_s * 0.97
    assert getattr(heeding.counters, rail) < getattr(deaf.counters, rail)


def test_a_machine_as_promised_is_planned_with_as_promised() -> None:
    rails = Rails(Costs.of(FAST_LINK))
    for _ in range(100):
        rails.link.note(1.0, 1.3, 1.1)
        rails.cpu.note(1.0, 1.5, 1.5)
        rails.end_pass()
    assert rails.costs == Costs.of(FAST_LINK)


def test_a_rail_without_work_is_tried_again() -> None:
    rail = Rail()
    for _ in range(60):
        rail.note(1.0, 1.2, 30.0)
    stalled = rail.scale
    assert stalled > 5
    for _ in range(400):
        rail.end_pass()
    assert rail.scale < 1.1


def test_the_scale_settles_where_the_rail_is() -> None:
    """Planned times have the scale in them: it must not run away."""
    rails = Rails(Costs.of(FAST_LINK))
    for _ in range(500):
        planned_s = 1.0 / rails.costs.link_bytes_per_s * 1e6
        truth_s = 3.0 * 1.0 / FAST_LINK.link_bytes_per_s.value * 1e6
        rails.link.note(planned_s, planned_s, truth_s)
        rails.end_pass()
    assert rails.link.scale == pytest.approx(3.0, rel=0.15)
