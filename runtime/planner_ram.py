"""The RAM half of a memory plan: how many experts it holds, and what else lies in it.

On a card RAM holds experts only: dense weights pass through it one tensor at a time, before the
first expert is read. Without one it holds the device's parts as well.
"""

from __future__ import annotations

from dataclasses import replace

from runtime.core import HardwareProfile, MemoryPlan, ModelShape
from runtime.errors import MemoryPlanError
from runtime.planner_words import size_text

RAM_RESERVE_BYTES = 512 * 2**20
RAM_RESERVE_PERCENT = 5
READING_EXPERTS = 8
"""Buffers for experts on their way from disk, where not all of them have a place in RAM."""


def place_in_ram(profile: HardwareProfile, shape: ModelShape, plan: MemoryPlan) -> MemoryPlan:
    """Return the plan with RAM divided: the experts get what the rest leaves over.

    Where RAM is too small for all of them, it holds as many as fit and the others stay on disk.
    RAM of unknown size is taken to hold everything; the allocation itself will tell.

    Raises:
        MemoryPlanError: it cannot even hold the experts of one token's layer.
    """
    count = shape.expert_count
    device_bytes = 0 if profile.device_kind == "cuda" else plan.used_bytes
    reading_bytes = shape.reading_bytes
    plan = replace(plan, ram_device_bytes=device_bytes, ram_reading_bytes=reading_bytes)
    if profile.ram_total_bytes <= 0:
        return _with_experts(profile, plan, count, None)
    free_bytes = profile.ram_free_bytes
    reserve_bytes = ram_reserve(free_bytes)
    plan = replace(plan, ram_budget_bytes=free_bytes, ram_reserve_bytes=reserve_bytes)
    rest_bytes = free_bytes - device_bytes - reading_bytes - reserve_bytes
    if rest_bytes >= count * shape.expert_bytes:
        return _with_experts(profile, plan, count, None)
    holds = rest_bytes // shape.expert_bytes - READING_EXPERTS
    least = min(2 * shape.top_k, count)
    if holds < least:
        raise _refusal(profile, shape, plan, least)
    reserve_bytes += READING_EXPERTS * shape.expert_bytes
    plan = replace(plan, ram_reserve_bytes=reserve_bytes)
    return _with_experts(profile, plan, holds, holds)


def ram_reserve(free_bytes: int) -> int:
    """Return how much of the free RAM a plan leaves alone."""
    return max(RAM_RESERVE_BYTES, -(-free_bytes * RAM_RESERVE_PERCENT // 100))


def _with_experts(
    profile: HardwareProfile, plan: MemoryPlan, count: int, ram_experts: int | None
) -> MemoryPlan:
    experts_bytes = count * plan.slot_bytes
    pinned_bytes = experts_bytes
    if profile.pinnable_bytes is not None:
        pinned_bytes = min(experts_bytes, max(profile.pinnable_bytes, 0))
    return replace(
        plan, ram_experts=ram_experts, ram_experts_bytes=experts_bytes, pinned_bytes=pinned_bytes
    )


def _refusal(
    profile: HardwareProfile, shape: ModelShape, plan: MemoryPlan, least: int
) -> MemoryPlanError:
    experts_bytes = (least + READING_EXPERTS) * shape.expert_bytes
    needed_bytes = (
        plan.ram_device_bytes + plan.ram_reading_bytes + plan.ram_reserve_bytes + experts_bytes
    )
    whole = size_text(shape.expert_count * shape.expert_bytes)
    return MemoryPlanError(
        f"{shape.name} needs at least {size_text(needed_bytes)} of memory even if its {whole} of"
        f" experts stay on the disk: {size_text(plan.ram_device_bytes)} weights and context,"
        f" {size_text(experts_bytes)} for the experts in use, {size_text(plan.ram_reserve_bytes)}"
        f" reserve. {size_text(profile.ram_free_bytes)} of {size_text(profile.ram_total_bytes)}"
        " are free.",
        f"Close other programs to free {size_text(needed_bytes - profile.ram_free_bytes)},"
        " or choose a smaller model.",
    )
