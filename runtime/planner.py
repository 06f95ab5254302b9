"""Where every byte goes, on the device and in RAM: a pure function of profile, model and wishes.

Whole bytes, rounded against us: parts up, slots down, so that a plan is within its budget by
construction. First everything gets its least: a short context, a small chunk, the slots that one
layer needs. A fixed share of what is left then goes to context and chunks, up to what they can
use, and the rest to slots. So more memory never gives less of anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from runtime.core import HardwareProfile, MemoryPlan, ModelShape
from runtime.errors import ConfigError, MemoryPlanError
from runtime.planner_ram import place_in_ram, ram_reserve
from runtime.planner_words import notes_of, size_text

MIB = 2**20
GIB = 2**30
DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 2048
CONTEXTS = 4
"""How many whole contexts the keys and values have room for, where there is room."""
MOST_TOGETHER = 16
"""No more sequences than this are computed together: what is left over need not hold more."""
COMFORT_PERCENT = 12
"""Share of what the least leaves over that goes to context and chunks instead of slots."""
PREFILL_TOKENS = 512
LEAST_PREFILL_TOKENS = 16
MOST_PREFILL_BYTES = 2 * GIB
RESERVE_BYTES = GIB
RESERVE_PERCENT = 5
CUDA_WORKSPACE_BYTES = 512 * MIB
EMULATED_WORKSPACE_BYTES = 8 * MIB
EMULATED_SLOTS_PER_EXPERT = 4


@dataclass(frozen=True)
class _Range:
    """The least that a part can do with, and the most that it has a use for."""

    least: int
    most: int

    @property
    def room(self) -> int:
        return self.most - self.least


@dataclass(frozen=True)
class _Needs:
    """What one model needs on one device beside its dense weights."""

    predictor_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    kv_tokens: _Range
    prefill_bytes: _Range
    slots: _Range
    most_context_tokens: int

    @property
    def fixed_slots(self) -> bool:
        return self.slots.room == 0


def plan_memory(
    profile: HardwareProfile,
    shape: ModelShape,
    *,
    cache_fraction: float | None = None,
    vram_bytes: int | None = None,
    context_tokens: int | None = None,
) -> MemoryPlan:
    """Divide the device's memory and RAM, or say with every number why it cannot be done.

    The budget is what the device has free, or `vram_bytes` if that is less. `cache_fraction` asks
    for that share of all experts as slots (at least one layer's top-k) instead of all that fit.
    `context_tokens` asks for room for one sequence of so many tokens (at most the model's
    context); without it the least is `LEAST_CONTEXT_TOKENS`. An emulated card without a size gets
    one that holds a quarter of the experts. On a CPU there are no slots. Experts that RAM cannot
    hold stay on disk.

    The parts never exceed the budgets. A larger budget never gives fewer slots, less context or
    smaller chunks, and more RAM never fewer experts in it.

    Raises:
        MemoryPlanError: not even the least fits.
        ConfigError: a wish makes no sense.
    """
    _check_wishes(cache_fraction, vram_bytes, context_tokens)
    needs = _needs(profile, shape, cache_fraction, context_tokens)
    budget_bytes = _budget(profile, vram_bytes)
    if budget_bytes is None:
        plan = _fixed_plan(shape, needs, profile)
    else:
        reserve_bytes = 0
        if profile.device_kind == "cuda":
            reserve_bytes = max(RESERVE_BYTES, -(-budget_bytes * RESERVE_PERCENT // 100))
        plan = _divide(budget_bytes, shape, replace(needs, reserve_bytes=reserve_bytes))
    plan = place_in_ram(profile, shape, plan)
    return replace(plan, notes=notes_of(shape, plan, _least_context(shape, context_tokens)))


def prefill_tokens(plan: MemoryPlan, shape: ModelShape, past_tokens: int = 0) -> int:
    """Return how many tokens of a prompt the plan has workspace for after `past_tokens`.

    A power of two up to `PREFILL_TOKENS`, and at least 1.
    """
    tokens = PREFILL_TOKENS
    if not plan.prefill_bytes:
        return tokens
    while tokens > 1:
        if shape.transients.size_bytes(tokens, past_tokens + tokens) <= plan.prefill_bytes:
            break
        tokens //= 2
    return tokens


def _budget(profile: HardwareProfile, vram_bytes: int | None) -> int | None:
    """Return the device's budget; None for a device that is as large as what goes on it."""
    if profile.device_kind == "cpu":
        return None
    if profile.device_kind == "emulated":
        budget_bytes = vram_bytes or profile.vram_free_bytes
        return budget_bytes if budget_bytes > 0 else None
    free_bytes = profile.vram_free_bytes
    return free_bytes if vram_bytes is None else min(free_bytes, vram_bytes)


def _needs(
    profile: HardwareProfile,
    shape: ModelShape,
    cache_fraction: float | None,
    context_tokens: int | None,
) -> _Needs:
    least_context = _least_context(shape, context_tokens)
    comfortable = max(min(DEFAULT_CONTEXT_TOKENS, shape.context_tokens), least_context)
    most_context = shape.context_tokens if context_tokens is None else least_context
    kv_tokens = _Range(least_context, CONTEXTS * comfortable)
    least_chunk = _chunk_bytes(shape, LEAST_PREFILL_TOKENS, least_context)
    whole_chunk = _chunk_bytes(shape, PREFILL_TOKENS, min(kv_tokens.most, most_context))
    count, top_k = shape.expert_count, min(shape.top_k, shape.expert_count)
    slots = _Range(top_k, count)
    if cache_fraction is not None:
        wanted = slots_for(shape, cache_fraction)
        slots = _Range(wanted, wanted)
    if profile.device_kind == "cpu":
        slots = _Range(0, 0)
    cuda = profile.device_kind == "cuda"
    return _Needs(
        # Without slots nothing is copied ahead, so nothing is predicted.
        predictor_bytes=0 if profile.device_kind == "cpu" else shape.predictor_bytes,
        workspace_bytes=CUDA_WORKSPACE_BYTES if cuda else EMULATED_WORKSPACE_BYTES,
        reserve_bytes=0,
        kv_tokens=kv_tokens,
        prefill_bytes=_Range(least_chunk, max(least_chunk, min(whole_chunk, MOST_PREFILL_BYTES))),
        slots=slots,
        most_context_tokens=most_context,
    )


def _divide(budget_bytes: int, shape: ModelShape, needs: _Needs) -> MemoryPlan:
    """Give everything its least and divide what is left over.

    Each part grows by 0 or 1 byte with each byte of the budget, and they never grow by more than
    one together: that is why nothing shrinks where the budget grows.
    """
    price = shape.kv_bytes_per_token
    kv, prefill, slots = needs.kv_tokens, needs.prefill_bytes, needs.slots
    least = MemoryPlan(
        budget_bytes=budget_bytes,
        dense_bytes=shape.dense_bytes,
        predictor_bytes=needs.predictor_bytes,
        kv_tokens=kv.least,
        kv_bytes=kv.least * price,
        workspace_bytes=needs.workspace_bytes + prefill.least,
        prefill_bytes=prefill.least,
        reserve_bytes=needs.reserve_bytes,
        slots=slots.least,
        slot_bytes=shape.expert_bytes,
    )
    rest_bytes = budget_bytes - least.used_bytes
    if rest_bytes < 0:
        raise _refusal(least, shape)
    pool_bytes = rest_bytes if needs.fixed_slots else rest_bytes * COMFORT_PERCENT // 100
    # Chunks get a third, and what keys and values have no use for.
    prefill_bytes = min(max(pool_bytes // 3, pool_bytes - kv.room * price), prefill.room)
    kv_bytes = min(pool_bytes - prefill_bytes, kv.room * price)
    rest_bytes -= prefill_bytes + kv_bytes
    more_slots = min(rest_bytes // shape.expert_bytes, slots.room)
    if slots.least + more_slots == shape.expert_count:
        # Every expert has its slot: what is left can only make more or longer chats possible.
        left_bytes = rest_bytes - more_slots * shape.expert_bytes
        most_tokens = max(MOST_TOGETHER * needs.most_context_tokens, kv.most)
        kv_bytes += min(left_bytes, max((most_tokens - kv.least) * price - kv_bytes, 0))
    kv_tokens = kv.most if price == 0 else kv.least + kv_bytes // price
    return replace(
        least,
        kv_tokens=kv_tokens,
        kv_bytes=least.kv_bytes + kv_bytes,
        workspace_bytes=least.workspace_bytes + prefill_bytes,
        prefill_bytes=least.prefill_bytes + prefill_bytes,
        slots=slots.least + more_slots,
        context_tokens=_context(shape, kv_tokens, least.prefill_bytes + prefill_bytes, needs),
    )


def _fixed_plan(shape: ModelShape, needs: _Needs, profile: HardwareProfile) -> MemoryPlan:
    """Plan a device that is exactly as large as what goes on it, with all the comfort there is.

    It is this computer's own memory: where that is short, comfort gives way as on a card.
    """
    slots = needs.slots.least
    if profile.device_kind == "emulated" and not needs.fixed_slots:
        slots = slots_for(shape, 1 / EMULATED_SLOTS_PER_EXPERT)
    needs = replace(needs, slots=_Range(slots, slots))
    least_bytes = _used_bytes(shape, needs, needs.kv_tokens.least, needs.prefill_bytes.least)
    budget_bytes = _used_bytes(shape, needs, needs.kv_tokens.most, needs.prefill_bytes.most)
    if profile.ram_total_bytes > 0:
        free_bytes = profile.ram_free_bytes - ram_reserve(profile.ram_free_bytes)
        experts_bytes = shape.expert_count * shape.expert_bytes
        spare_bytes = free_bytes - least_bytes - shape.reading_bytes - experts_bytes
        comfort_bytes = max(spare_bytes, free_bytes * COMFORT_PERCENT // 200, 0)
        budget_bytes = min(budget_bytes, least_bytes + comfort_bytes)
    plan = _divide(budget_bytes, shape, needs)
    return replace(plan, budget_bytes=plan.used_bytes)


def _used_bytes(shape: ModelShape, needs: _Needs, kv_tokens: int, prefill_bytes: int) -> int:
    return (
        shape.dense_bytes
        + needs.predictor_bytes
        + needs.workspace_bytes
        + prefill_bytes
        + kv_tokens * shape.kv_bytes_per_token
        + needs.slots.least * shape.expert_bytes
    )


def _least_context(shape: ModelShape, context_tokens: int | None) -> int:
    return min(context_tokens or LEAST_CONTEXT_TOKENS, shape.context_tokens)


def _chunk_bytes(shape: ModelShape, tokens: int, context_tokens: int) -> int:
    return shape.transients.size_bytes(min(tokens, context_tokens), context_tokens)


def _context(shape: ModelShape, kv_tokens: int, prefill_bytes: int, needs: _Needs) -> int:
    """Return how long one sequence may get: a small chunk must still fit at its end."""
    transients = shape.transients
    per_token = transients.context_bytes + LEAST_PREFILL_TOKENS * transients.pair_bytes
    longest = min(kv_tokens, needs.most_context_tokens)
    if per_token:
        left_bytes = prefill_bytes - transients.size_bytes(LEAST_PREFILL_TOKENS, 0)
        longest = min(longest, max(left_bytes // per_token, needs.kv_tokens.least))
    return longest


def slots_for(shape: ModelShape, fraction: float) -> int:
    """Return how many slots that share of all experts is: at least one layer's top-k."""
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


def _refusal(least: MemoryPlan, shape: ModelShape) -> MemoryPlanError:
    weights_bytes = least.dense_bytes + least.predictor_bytes
    missing_bytes = least.used_bytes - least.budget_bytes
    return MemoryPlanError(
        f"{shape.name} needs at least {size_text(least.used_bytes)} of device memory, but the"
        f" budget is {size_text(least.budget_bytes)}: {size_text(weights_bytes)} dense"
        f" weights, {size_text(least.kv_bytes)} for {least.kv_tokens} tokens of context,"
        f" {size_text(least.workspace_bytes)} workspace,"
        f" {size_text(least.reserve_bytes)} reserve,"
        f" {size_text(least.slots_bytes)} for {least.slots} expert slots"
        f" of {size_text(least.slot_bytes)}.",
        f"Free or allow {size_text(missing_bytes)} more, use fewer tokens of context"
        " or a smaller cache, or choose a smaller model.",
    )
