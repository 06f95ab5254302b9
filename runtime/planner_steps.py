"""What to try when memory that a plan counted on is not there: less cache, then less context.

Somebody else may have taken memory since it was looked at, or fragments of it are too small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.core import MemoryPlan, ModelShape
from runtime.planner import LEAST_CONTEXT_TOKENS, LEAST_PREFILL_TOKENS, PREFILL_TOKENS

CACHE_STEPS = (75, 50)
"""Percent of the slots, and of the experts in RAM, that the first smaller plans keep."""


def smaller_plans(plan: MemoryPlan, shape: ModelShape) -> Iterator[MemoryPlan]:
    """Yield plans that need less and less: smaller caches first, at last the shortest context.

    Every one needs less than the one before; there is none where nothing can be given up.
    """
    last = plan
    for percent in CACHE_STEPS:
        smaller = _with_caches(plan, shape, percent)
        if smaller != last:
            yield smaller
        last = smaller
    least = _with_least_context(_with_caches(plan, shape, 0), shape)
    if least != last:
        yield least


def shortened(plan: MemoryPlan, shape: ModelShape) -> str:
    """Return what `plan` comes down to, in words."""
    cache = f"{plan.slots:,} of {shape.expert_count:,} experts in slots, " if plan.slots else ""
    held = shape.expert_count if plan.ram_experts is None else plan.ram_experts
    return f"{cache}{held:,} in RAM, {plan.context_tokens:,} tokens of context"


def _with_caches(plan: MemoryPlan, shape: ModelShape, percent: int) -> MemoryPlan:
    """Keep this share of both caches, but at least what one layer needs."""
    least_slots = min(shape.top_k, shape.expert_count, plan.slots)
    least_held = min(2 * shape.top_k, shape.expert_count)
    held = shape.expert_count if plan.ram_experts is None else plan.ram_experts
    kept = max(held * percent // 100, min(least_held, held))
    return replace(
        plan,
        slots=max(plan.slots * percent // 100, least_slots),
        ram_experts=None if kept == shape.expert_count else kept,
        ram_experts_bytes=kept * plan.slot_bytes,
        pinned_bytes=min(plan.pinned_bytes, kept * plan.slot_bytes),
    )


def _with_least_context(plan: MemoryPlan, shape: ModelShape) -> MemoryPlan:
    tokens = min(LEAST_CONTEXT_TOKENS, plan.context_tokens or plan.kv_tokens)
    chunk = min(LEAST_PREFILL_TOKENS, PREFILL_TOKENS, tokens)
    prefill_bytes = min(plan.prefill_bytes, shape.transients.size_bytes(chunk, tokens))
    return replace(
        plan,
        kv_tokens=tokens,
        kv_bytes=tokens * shape.kv_bytes_per_token,
        context_tokens=tokens,
        workspace_bytes=plan.workspace_bytes - plan.prefill_bytes + prefill_bytes,
        prefill_bytes=prefill_bytes,
    )
