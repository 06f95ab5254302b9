"""Where every byte of the device's memory goes: a pure function of profile, model and wishes.

Whole bytes, rounded against us: parts up, slots down, so that a plan is within its budget by
construction.
"""

from __future__ import annotations

import math

from runtime.core import HardwareProfile, MemoryPlan, ModelShape
from runtime.errors import ConfigError, MemoryPlanError

MIB = 2**20
GIB = 2**30
DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 2048
RESERVE_BYTES = GIB
RESERVE_PERCENT = 5
CUDA_WORKSPACE_BYTES = 512 * MIB
EMULATED_WORKSPACE_BYTES = 8 * MIB
HOST_RESERVE_BYTES = 512 * MIB
EMULATED_SLOTS_PER_EXPERT = 4


def plan_memory(
    profile: HardwareProfile,
    shape: ModelShape,
    *,
    cache_fraction: float | None = None,
    vram_bytes: int | None = None,
    context_tokens: int | None = None,
) -> MemoryPlan:
    """Divide the device's memory, or say with every number why it cannot be done.

    The budget is what the device has free, or `vram_bytes` if that is less. `cache_fraction` asks
    for that share of all experts as slots (at least one layer's top-k) instead of all that fit.
    `context_tokens` asks for that much KV (at most the model's context); without it the KV gives
    way to the slots that a layer needs, down to `LEAST_CONTEXT_TOKENS`. An emulated card without a
    size gets one that holds a quarter of the experts. On a CPU there are no slots.

    The parts never exceed the budget, and a larger budget never gives fewer slots.

    Raises:
        MemoryPlanError: the model does not fit.
        ConfigError: a wish makes no sense.
    """
    _check_wishes(cache_fraction, vram_bytes, context_tokens)
    kv_tokens = min(context_tokens or DEFAULT_CONTEXT_TOKENS, shape.context_tokens)
    _check_host_memory(profile, shape, kv_tokens)
    slots = None if cache_fraction is None else _slots_for(shape, cache_fraction)
    if profile.device_kind == "cpu":
        return _fixed_plan(shape, kv_tokens, 0, 0)
    if profile.device_kind == "emulated":
        budget_bytes = vram_bytes or profile.vram_free_bytes
        if budget_bytes <= 0:
            wanted = slots or _slots_for(shape, 1 / EMULATED_SLOTS_PER_EXPERT)
            return _fixed_plan(shape, kv_tokens, EMULATED_WORKSPACE_BYTES, wanted)
        return _divide(budget_bytes, shape, kv_tokens, EMULATED_WORKSPACE_BYTES, 0, slots, True)
    budget_bytes = profile.vram_free_bytes
    if vram_bytes is not None:
        budget_bytes = min(budget_bytes, vram_bytes)
    reserve_bytes = max(RESERVE_BYTES, _up(budget_bytes * RESERVE_PERCENT, 100))
    fixed_context = context_tokens is not None
    return _divide(
        budget_bytes, shape, kv_tokens, CUDA_WORKSPACE_BYTES, reserve_bytes, slots, fixed_context
    )


def _divide(
    budget_bytes: int,
    shape: ModelShape,
    kv_tokens: int,
    workspace_bytes: int,
    reserve_bytes: int,
    slots: int | None,
    fixed_context: bool,
) -> MemoryPlan:
    """Give the slots what the other parts leave; `slots` None takes all that fit."""
    least_slots = min(shape.top_k, shape.expert_count) if slots is None else slots
    left_bytes = budget_bytes - shape.dense_bytes - workspace_bytes - reserve_bytes
    if not fixed_context and shape.kv_bytes_per_token > 0:
        affordable = (left_bytes - least_slots * shape.expert_bytes) // shape.kv_bytes_per_token
        kv_tokens = min(kv_tokens, max(affordable, LEAST_CONTEXT_TOKENS))
    kv_bytes = kv_tokens * shape.kv_bytes_per_token
    fitting = min((left_bytes - kv_bytes) // shape.expert_bytes, shape.expert_count)
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        dense_bytes=shape.dense_bytes,
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes,
        reserve_bytes=reserve_bytes,
        slots=fitting if slots is None else slots,
        slot_bytes=shape.expert_bytes,
    )
    if fitting < least_slots:
        raise _refusal(plan, shape, least_slots)
    return plan


def _fixed_plan(shape: ModelShape, kv_tokens: int, workspace_bytes: int, slots: int) -> MemoryPlan:
    """Plan a device that is exactly as large as what goes on it."""
    kv_bytes = kv_tokens * shape.kv_bytes_per_token
    slots_bytes = slots * shape.expert_bytes
    return MemoryPlan(
        budget_bytes=shape.dense_bytes + kv_bytes + workspace_bytes + slots_bytes,
        dense_bytes=shape.dense_bytes,
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes,
        reserve_bytes=0,
        slots=slots,
        slot_bytes=shape.expert_bytes,
    )


def _slots_for(shape: ModelShape, fraction: float) -> int:
    count = shape.expert_count
    # Adding up a hair before flooring keeps 0.3 * 10 from becoming 2.
    return min(max(math.floor(fraction * count + 1e-9), min(shape.top_k, count)), count)


def _check_wishes(
    cache_fraction: float | None, vram_bytes: int | None, context_tokens: int | None
) -> None:
    if cache_fraction is not None and not 0.0 <= cache_fraction <= 1.0:
        raise ConfigError(
            f"The share of experts in the cache is {cache_fraction}.", "Choose a share from 0 to 1."
        )
    if vram_bytes is not None and vram_bytes < 0:
        raise ConfigError(
            f"The VRAM limit is {vram_bytes} bytes.", "Choose a positive number of bytes."
        )
    if context_tokens is not None and context_tokens < 1:
        raise ConfigError(
            f"The context is {context_tokens} tokens.", "Choose a positive number of tokens."
        )


def _check_host_memory(profile: HardwareProfile, shape: ModelShape, kv_tokens: int) -> None:
    if profile.ram_total_bytes <= 0:
        return  # Unknown; the allocation itself will tell.
    experts_bytes = shape.expert_count * shape.expert_bytes
    needed_bytes = experts_bytes
    if profile.device_kind != "cuda":
        needed_bytes += shape.dense_bytes + kv_tokens * shape.kv_bytes_per_token
    if profile.device_kind != "emulated":
        needed_bytes += HOST_RESERVE_BYTES
    if needed_bytes > profile.ram_free_bytes:
        raise MemoryPlanError(
            f"{shape.name} needs {_size(needed_bytes)} of memory ({_size(experts_bytes)} of them"
            f" for {shape.expert_count} experts), but {_size(profile.ram_free_bytes)} of"
            f" {_size(profile.ram_total_bytes)} are free.",
            f"Close other programs to free {_size(needed_bytes - profile.ram_free_bytes)},"
            " or choose a smaller model.",
        )


def _refusal(plan: MemoryPlan, shape: ModelShape, least_slots: int) -> MemoryPlanError:
    least_bytes = plan.used_bytes - plan.slots_bytes + least_slots * plan.slot_bytes
    return MemoryPlanError(
        f"{shape.name} needs {_size(least_bytes)} of device memory, but the budget is"
        f" {_size(plan.budget_bytes)}: {_size(plan.dense_bytes)} dense weights,"
        f" {_size(plan.kv_bytes)} for {plan.kv_tokens} tokens of context,"
        f" {_size(plan.workspace_bytes)} workspace, {_size(plan.reserve_bytes)} reserve,"
        f" {_size(least_slots * plan.slot_bytes)} for {least_slots} expert slots"
        f" of {_size(plan.slot_bytes)}.",
        f"Free or allow {_size(least_bytes - plan.budget_bytes)} more, use fewer tokens of context"
        " or a smaller cache, or choose a smaller model.",
    )


def _size(size_bytes: int) -> str:
    if abs(size_bytes) >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    return f"{size_bytes / MIB:.1f} MiB"


def _up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
