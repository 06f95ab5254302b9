"""The plan never promises a byte that is not there, whatever the machine, model and wishes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from runtime import planner, planner_ram
from runtime.core import HardwareProfile, MemoryPlan, ModelShape, Reading, Transients
from runtime.errors import ConfigError, MemoryPlanError

GIB = 2**30
ASSUMED = Reading(1.0, "assumed")
CARD = HardwareProfile(
    device_kind="cuda",
    device_name="card",
    vram_total_bytes=12 * GIB,
    vram_free_bytes=11 * GIB,
    ram_total_bytes=64 * GIB,
    ram_free_bytes=60 * GIB,
    link_bytes_per_s=ASSUMED,
    link_unpinned_bytes_per_s=ASSUMED,
    link_call_s=ASSUMED,
    cpu_expert_bytes_per_s=ASSUMED,
    cpu_expert_bytes_per_s_while_copying=ASSUMED,
    cpu_call_s=ASSUMED,
    device_bytes_per_s=ASSUMED,
    device_layer_s=ASSUMED,
    host_layer_s=ASSUMED,
)
EMULATED = replace(CARD, device_kind="emulated", vram_total_bytes=0, vram_free_bytes=0)
SHAPE = ModelShape(
    name="model",
    experts=(128,) * 48,
    top_k=8,
    expert_bytes=9_437_184,
    dense_bytes=3 * GIB,
    kv_bytes_per_token=98_304,
    context_tokens=32_768,
    transients=Transients(37_392, 16_384, 1),
    predictor_bytes=50_331_648,
)
UNFUSED = Transients(27_278, 16_384, 64 * 6 + 2)


def gib(low: int, high: int) -> st.SearchStrategy[int]:
    """Draw bytes spread over a range of GiB; plain integers would nearly always be tiny."""
    return st.builds(
        lambda whole, rest: whole * GIB + rest, st.integers(low, high), st.integers(0, GIB)
    )


shapes = st.builds(
    ModelShape,
    name=st.just("model"),
    experts=st.sampled_from(((8,), (64, 8, 128), (64,) * 24, (128,) * 48, (512,) * 94)),
    top_k=st.integers(1, 8),
    expert_bytes=st.sampled_from((64, 2**16, 9 * 2**20, 9_437_250, 2**25)),
    dense_bytes=gib(0, 8),
    kv_bytes_per_token=st.sampled_from((0, 1, 4096, 98_304, 2**18)),
    context_tokens=st.integers(1, 2**20),
    transients=st.sampled_from(
        (
            Transients(),
            SHAPE.transients,
            UNFUSED,
            Transients(1, 0, 7),
            Transients(10**7, 3, 0, 10**8),
        )
    ),
    predictor_bytes=st.sampled_from((0, 1, 50_331_648)),
)
machines = st.builds(
    replace,
    st.sampled_from((CARD, EMULATED, replace(CARD, device_kind="cpu"))),
    vram_free_bytes=st.one_of(gib(0, 100), st.integers(-1, GIB)),
    ram_total_bytes=st.sampled_from((0, 64 * GIB, 2**45)),
    ram_free_bytes=st.one_of(gib(0, 64), gib(16, 2**14)),
    pinnable_bytes=st.one_of(st.none(), gib(0, 64)),
)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "cache_fraction": st.floats(0, 1),
        "vram_bytes": gib(0, 100),
        "context_tokens": st.integers(1, 2**20),
    },
)

Planner = Callable[..., MemoryPlan]


def outcome(
    plan_memory: Planner, machine: Any, shape: ModelShape, wish: dict[str, Any]
) -> MemoryPlan | MemoryPlanError:
    """Return the plan or the refusal."""
    try:
        return plan_memory(machine, shape, **wish)
    except MemoryPlanError as error:
        return error


def check_plan(plan_memory: Planner, machine: Any, shape: ModelShape, wish: dict[str, Any]) -> None:
    """Assert every invariant of one plan, with arithmetic of its own."""
    plan = outcome(plan_memory, machine, shape, wish)
    if isinstance(plan, MemoryPlanError):
        assert re.search(r"\d", plan.message)
        assert plan.next_step
        return
    parts = (
        plan.dense_bytes,
        plan.predictor_bytes,
        plan.kv_bytes,
        plan.workspace_bytes,
        plan.reserve_bytes,
    )
    assert min(*parts, plan.slots) >= 0
    assert plan.dense_bytes >= shape.dense_bytes
    assert plan.kv_bytes >= plan.kv_tokens * shape.kv_bytes_per_token
    assert sum(parts) + plan.slots * shape.expert_bytes <= plan.budget_bytes
    assert plan.slot_bytes == shape.expert_bytes
    check_context(plan, shape, wish)
    check_ram(machine, plan, shape, parts)
    if machine.device_kind == "cpu":
        assert plan.slots == 0
        return
    assert plan.predictor_bytes >= shape.predictor_bytes
    assert min(shape.top_k, shape.expert_count) <= plan.slots <= shape.expert_count
    if machine.device_kind == "cuda":
        assert plan.reserve_bytes >= max(2**30, plan.budget_bytes * 0.05)
        assert plan.budget_bytes <= machine.vram_free_bytes
        assert plan.budget_bytes <= wish.get("vram_bytes", machine.vram_free_bytes)
    if "cache_fraction" not in wish and machine.device_kind == "cuda":
        spare = plan.budget_bytes - sum(parts) - plan.slots * shape.expert_bytes
        assert spare < shape.expert_bytes or plan.slots == shape.expert_count


def check_context(plan: MemoryPlan, shape: ModelShape, wish: dict[str, Any]) -> None:
    """Assert that the longest sequence fits the KV budget, and its chunks the workspace."""
    least = min(wish.get("context_tokens", 2048), shape.context_tokens)
    assert least <= plan.context_tokens <= min(shape.context_tokens, plan.kv_tokens)
    if "context_tokens" in wish:
        assert plan.context_tokens == least
    assert plan.prefill_bytes <= plan.workspace_bytes
    for past in (0, plan.context_tokens // 2, max(plan.context_tokens - 16, 0)):
        chunk = planner.prefill_tokens(plan, shape, past)
        assert chunk in {2**power for power in range(10)}
        chunk = min(chunk, plan.context_tokens - past)
        reach = past + chunk
        need = shape.transients.base_bytes
        need += chunk * shape.transients.token_bytes + reach * shape.transients.context_bytes
        assert need + chunk * reach * shape.transients.pair_bytes <= plan.prefill_bytes


def check_ram(machine: Any, plan: MemoryPlan, shape: ModelShape, parts: tuple[int, ...]) -> None:
    """Assert that RAM holds what the plan puts there, or that the disk holds the rest."""
    held = shape.expert_count if plan.ram_experts is None else plan.ram_experts
    assert plan.ram_experts is None or shape.top_k <= plan.ram_experts < shape.expert_count
    assert plan.ram_experts_bytes == held * shape.expert_bytes
    assert 0 <= plan.pinned_bytes <= plan.ram_experts_bytes
    if machine.pinnable_bytes is not None:
        assert plan.pinned_bytes <= machine.pinnable_bytes
    assert bool(plan.ram_experts is not None) == any("disk" in note for note in plan.notes)
    if machine.device_kind != "cuda":
        assert plan.ram_device_bytes == sum(parts) + plan.slots * shape.expert_bytes
    if machine.ram_total_bytes:
        assert plan.ram_budget_bytes <= machine.ram_free_bytes
        assert plan.ram_reserve_bytes >= max(2**29, machine.ram_free_bytes * 0.05)
        in_ram = plan.ram_device_bytes + plan.ram_reserve_bytes + plan.ram_experts_bytes
        assert in_ram <= plan.ram_budget_bytes


@settings(max_examples=300, deadline=None)
@given(machines, shapes, wishes)
def test_a_plan_keeps_its_invariants_or_is_refused_by_name(
    machine: Any, shape: ModelShape, wish: dict[str, Any]
) -> None:
    check_plan(planner.plan_memory, machine, shape, wish)
    twice = [outcome(planner.plan_memory, machine, shape, wish) for _ in range(2)]
    assert str(twice[0]) == str(twice[1])


@settings(max_examples=300, deadline=None)
@given(machines, shapes, wishes, st.integers(0, 64 * GIB))
@example(replace(CARD, vram_free_bytes=6 * GIB), SHAPE, {}, GIB)
def test_less_memory_never_gives_more_slots(
    machine: Any, shape: ModelShape, wish: dict[str, Any], less: int
) -> None:
    wish = {key: value for key, value in wish.items() if key != "vram_bytes"}
    if machine.device_kind == "emulated":  # its memory is RAM: a larger card leaves less of that
        machine = replace(machine, ram_total_bytes=0)
    smaller = replace(machine, vram_free_bytes=max(machine.vram_free_bytes - less, 1))
    larger = replace(machine, vram_free_bytes=max(machine.vram_free_bytes, 1))
    few, many = (outcome(planner.plan_memory, m, shape, wish) for m in (smaller, larger))
    if isinstance(few, MemoryPlan):
        assert isinstance(many, MemoryPlan)
        assert few.slots <= many.slots
        assert few.kv_tokens <= many.kv_tokens
        assert few.context_tokens <= many.context_tokens
        assert few.prefill_bytes <= many.prefill_bytes


@settings(max_examples=300, deadline=None)
@given(machines, shapes, wishes, st.one_of(st.integers(0, 2000), gib(0, 64)))
def test_less_ram_never_holds_more_experts(
    machine: Any, shape: ModelShape, wish: dict[str, Any], less: int
) -> None:
    machine = replace(machine, ram_total_bytes=max(machine.ram_total_bytes, 1))
    if machine.device_kind == "emulated":  # one with a size takes its slots from RAM first
        machine = replace(machine, vram_free_bytes=0)
        wish = {key: value for key, value in wish.items() if key != "vram_bytes"}
    smaller = replace(machine, ram_free_bytes=max(machine.ram_free_bytes - less, 0))
    few, many = (outcome(planner.plan_memory, m, shape, wish) for m in (smaller, machine))
    if isinstance(few, MemoryPlan):
        assert isinstance(many, MemoryPlan)
        assert few.ram_experts_bytes <= many.ram_experts_bytes
        assert few.slots <= many.slots
        assert few.kv_tokens <= many.kv_tokens


def rounds_slots_up(machine: Any, shape: ModelShape, **wish: Any) -> MemoryPlan:
    plan = planner.plan_memory(machine, shape, **wish)
    spare = plan.budget_bytes - plan.used_bytes
    one_more = spare > 0 and 0 < plan.slots < shape.expert_count
    return replace(plan, slots=plan.slots + 1) if one_more else plan


def forgets_the_kv(machine: Any, shape: ModelShape, **wish: Any) -> MemoryPlan:
    plan = planner.plan_memory(machine, replace(shape, kv_bytes_per_token=0), **wish)
    return replace(plan, kv_bytes=0)


def forgets_the_context_in_the_workspace(
    machine: Any, shape: ModelShape, **wish: Any
) -> MemoryPlan:
    plan = planner.plan_memory(machine, shape, **wish)
    return replace(plan, context_tokens=min(plan.kv_tokens, shape.context_tokens))


def lets_ram_overflow(machine: Any, shape: ModelShape, **wish: Any) -> MemoryPlan:
    plan = planner.plan_memory(machine, shape, **wish)
    if plan.ram_experts is None:
        return plan
    more = plan.ram_experts + planner_ram.READING_EXPERTS + 1
    return replace(plan, ram_experts=more, ram_experts_bytes=more * shape.expert_bytes)


def takes_mb_for_mib(machine: Any, shape: ModelShape, **wish: Any) -> MemoryPlan:
    plan = planner.plan_memory(machine, shape, **wish)
    return replace(plan, reserve_bytes=plan.reserve_bytes // 2**20 * 10**6)


@pytest.mark.parametrize(
    "mutant",
    [
        rounds_slots_up,
        forgets_the_kv,
        forgets_the_context_in_the_workspace,
        lets_ram_overflow,
        takes_mb_for_mib,
    ],
)
def test_the_properties_catch_a_planted_mistake(mutant: Planner) -> None:
    @settings(
        max_examples=4000, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(machines, shapes, wishes)
    def property_(machine: Any, shape: ModelShape, wish: dict[str, Any]) -> None:
        check_plan(mutant, machine, shape, wish)

    with pytest.raises(AssertionError):
        property_()


def test_an_emulated_card_without_a_size_holds_a_quarter_of_the_experts() -> None:
    plan = planner.plan_memory(EMULATED, SHAPE)
    assert plan.slots == SHAPE.expert_count // 4
    assert plan.reserve_bytes == 0
    assert plan.used_bytes == plan.budget_bytes


@pytest.mark.parametrize(("fraction", "slots"), [(0.0, 8), (0.1, 614), (0.5, 3072), (1.0, 6144)])
def test_a_share_of_the_experts_becomes_that_many_slots(fraction: float, slots: int) -> None:
    roomy = replace(EMULATED, ram_total_bytes=0)
    assert planner.plan_memory(roomy, SHAPE, cache_fraction=fraction).slots == slots


def test_the_context_gives_way_before_the_model_is_refused() -> None:
    card = replace(CARD, vram_free_bytes=5 * GIB)
    plan = planner.plan_memory(card, SHAPE)
    assert planner.LEAST_CONTEXT_TOKENS <= plan.kv_tokens < planner.DEFAULT_CONTEXT_TOKENS
    assert plan.slots >= SHAPE.top_k
    assert any("tight" in note and "32,768" in note for note in plan.notes)
    with pytest.raises(MemoryPlanError, match="8192 tokens"):
        planner.plan_memory(card, SHAPE, context_tokens=8192)


def test_an_8_gb_card_gets_the_smallest_plan() -> None:
    heavy = replace(SHAPE, dense_bytes=int(4.6 * GIB), transients=UNFUSED)
    plan = planner.plan_memory(replace(CARD, vram_free_bytes=int(6.62 * GIB)), heavy)
    assert plan.context_tokens < 2 * planner.LEAST_CONTEXT_TOKENS
    assert planner.prefill_tokens(plan, heavy, 2000) < planner.PREFILL_TOKENS
    assert plan.slots < 4 * heavy.top_k


def test_several_whole_contexts_fit_where_there_is_room() -> None:
    assert planner.plan_memory(EMULATED, SHAPE).kv_tokens == 4 * planner.DEFAULT_CONTEXT_TOKENS
    short = replace(SHAPE, context_tokens=1024)
    plan = planner.plan_memory(EMULATED, short)
    assert (plan.kv_tokens, plan.context_tokens) == (4 * 1024, 1024)
    whole = planner.plan_memory(replace(CARD, vram_free_bytes=130 * GIB), SHAPE)
    assert whole.slots == SHAPE.expert_count
    assert whole.kv_tokens == 16 * SHAPE.context_tokens


def test_an_attention_that_keeps_its_scores_gets_smaller_chunks_in_bounded_workspace() -> None:
    card = replace(CARD, vram_free_bytes=22 * GIB)
    fused = planner.plan_memory(card, SHAPE)
    unfused_shape = replace(SHAPE, transients=UNFUSED)
    unfused = planner.plan_memory(card, unfused_shape)
    late = unfused.context_tokens - 512
    assert unfused.context_tokens > 8192
    assert planner.prefill_tokens(fused, SHAPE, fused.context_tokens - 512) == 512
    assert 16 <= planner.prefill_tokens(unfused, unfused_shape, late) <= 128
    assert planner.prefill_tokens(unfused, unfused_shape, 0) == 512
    whole = 512 * unfused.context_tokens * UNFUSED.pair_bytes
    assert unfused.workspace_bytes < whole / 2
    assert unfused.prefill_bytes <= planner.MOST_PREFILL_BYTES


def test_a_refusal_states_every_number() -> None:
    with pytest.raises(MemoryPlanError) as refused:
        planner.plan_memory(replace(CARD, vram_free_bytes=2 * GIB), SHAPE)
    for number in (
        "2.00 GiB",
        "3.05 GiB",
        "2048 tokens",
        "544.6 MiB",
        "1.00 GiB",
        "8 expert slots",
    ):
        assert number in refused.value.message
    assert "GiB more" in refused.value.next_step


def test_experts_that_ram_cannot_hold_stay_on_disk() -> None:
    plan = planner.plan_memory(replace(CARD, ram_free_bytes=32 * GIB), SHAPE)
    held = int((32 - 1.6) * GIB) // SHAPE.expert_bytes - planner_ram.READING_EXPERTS
    assert plan.ram_experts == held
    (note,) = plan.notes
    assert "54.00 GiB" in note
    assert f"{held:,} of 6,144" in note
    assert planner.plan_memory(CARD, SHAPE).ram_experts is None


def test_ram_that_holds_next_to_nothing_is_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryPlanError, match=r"54\.00 GiB of experts.*600\.0 MiB of 64\.00 GiB"):
        planner.plan_memory(replace(CARD, ram_free_bytes=600 * 2**20), SHAPE)


def test_pinned_memory_is_no_more_than_the_system_lets_be_pinned() -> None:
    assert planner.plan_memory(CARD, SHAPE).pinned_bytes == 54 * GIB
    plan = planner.plan_memory(replace(CARD, pinnable_bytes=GIB), SHAPE)
    assert plan.pinned_bytes == GIB
    assert any("1.00 GiB of the 54.00 GiB" in note for note in plan.notes)


@pytest.mark.parametrize(
    "wish",
    [
        {"cache_fraction": -0.1},
        {"cache_fraction": 1.5},
        {"cache_fraction": float("nan")},
        {"vram_bytes": -1},
        {"context_tokens": 0},
    ],
)
def test_a_wish_that_makes_no_sense_is_named(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(next(iter(wish.values()))))):
        planner.plan_memory(CARD, SHAPE, **wish)
