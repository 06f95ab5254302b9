"""Each smaller plan needs less than the one before, and the last one the least."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings

from runtime import planner
from runtime.core import MemoryPlan, ModelShape
from runtime.errors import MemoryPlanError
from runtime.planner_steps import shortened, smaller_plans
from tests.test_planner import CARD, SHAPE, machines, shapes, wishes


def needs(plan: MemoryPlan) -> tuple[int, int]:
    return plan.used_bytes, plan.ram_experts_bytes


@settings(max_examples=200, deadline=None)
@given(machines, shapes, wishes)
def test_every_step_needs_less_and_keeps_what_a_layer_needs(
    machine: Any, shape: ModelShape, wish: dict[str, Any]
) -> None:
    try:
        plan = planner.plan_memory(machine, shape, **wish)
    except MemoryPlanError:
        assume(False)
    last = plan
    for smaller in smaller_plans(plan, shape):
        assert needs(smaller) != needs(last) or smaller.kv_tokens < last.kv_tokens
        assert all(now <= before for now, before in zip(needs(smaller), needs(last), strict=True))
        assert smaller.kv_tokens <= last.kv_tokens
        assert smaller.slots >= min(shape.top_k, plan.slots)
        assert 1 <= smaller.context_tokens <= smaller.kv_tokens
        assert smaller.kv_bytes >= smaller.kv_tokens * shape.kv_bytes_per_token
        assert 0 <= smaller.prefill_bytes <= smaller.workspace_bytes
        assert planner.prefill_tokens(smaller, shape) >= 1
        last = smaller


def test_slots_go_before_context() -> None:
    plan = planner.plan_memory(CARD, SHAPE)
    steps = list(smaller_plans(plan, SHAPE))
    assert [step.slots for step in steps] == [plan.slots * 3 // 4, plan.slots // 2, SHAPE.top_k]
    assert [step.kv_tokens for step in steps[:2]] == [plan.kv_tokens] * 2
    assert steps[2].kv_tokens == steps[2].context_tokens == planner.LEAST_CONTEXT_TOKENS
    assert steps[0].ram_experts == 4608
    assert "experts in slots" in shortened(steps[0], SHAPE)


def test_a_plan_that_has_nothing_to_give_has_no_smaller_one() -> None:
    shape = replace(SHAPE, experts=(8,), context_tokens=100)
    plan = planner.plan_memory(CARD, shape, context_tokens=100)
    least = list(smaller_plans(plan, shape))[-1] if list(smaller_plans(plan, shape)) else plan
    assert list(smaller_plans(least, shape)) == []
