"""What is foretold follows the machine and the plan, and never claims more than it is."""

from __future__ import annotations

from dataclasses import replace

from runtime.core import HardwareProfile, MemoryPlan, ModelShape, Reading
from runtime.machines import stated_machine
from runtime.planner import plan_memory
from runtime.synthetic import STATISTICS
from runtime.throughput import Throughput, foretell, nearest

GIB = 2**30
SHAPE = ModelShape(
    name="model",
    experts=(64,) * 16,
    top_k=8,
    expert_bytes=12_582_912,
    dense_bytes=GIB,
    kv_bytes_per_token=65_536,
    context_tokens=4096,
)


def profile_of(card: str, vram_gib: float, ram_gib: float = 60.0, **parts: str) -> HardwareProfile:
    return replace(
        stated_machine(card, **parts).profile(SHAPE.dense_bytes // SHAPE.layers),
        device_kind="cuda",
        vram_free_bytes=int(vram_gib * GIB),
        ram_free_bytes=int(ram_gib * GIB),
    )


def foretold(profile: HardwareProfile, **changes: object) -> tuple[Throughput, MemoryPlan]:
    plan = replace(plan_memory(profile, SHAPE), **changes)  # type: ignore[arg-type]
    return foretell(SHAPE, plan, profile, seeds=(1,)), plan


def test_more_slots_a_faster_link_and_enough_ram_are_faster() -> None:
    small, _ = foretold(profile_of("rtx4090", 5))
    large, _ = foretold(profile_of("rtx4090", 10))
    thin, _ = foretold(profile_of("rtx4090", 5, link="pcie3x4", cpu="cpu25"))
    disk, plan = foretold(profile_of("rtx4090", 5, ram_gib=7))
    assert small.tokens_per_s < large.tokens_per_s
    assert small.hit_rate < large.hit_rate
    assert thin.tokens_per_s < small.tokens_per_s
    assert plan.ram_experts is not None
    assert disk.tokens_per_s < small.tokens_per_s
    assert disk.disk_bytes_per_token > 0 == small.disk_bytes_per_token
    assert "disk" in disk.origin


def test_all_experts_in_slots_are_limited_by_the_card_alone() -> None:
    profile = profile_of("rtx4090", 22)
    fast, plan = foretold(profile)
    assert plan.slots == SHAPE.expert_count
    assert fast.hit_rate == 1.0
    card = profile.device_bytes_per_s.value
    token_s = (SHAPE.dense_bytes + SHAPE.layers * SHAPE.top_k * SHAPE.expert_bytes) / card
    host_s = SHAPE.layers * profile.host_layer_s.value
    assert 1 / (token_s + host_s) <= fast.tokens_per_s <= 1 / token_s


def test_the_band_holds_the_figure_and_says_what_it_is() -> None:
    said = foretell(SHAPE, plan_memory(profile_of("rtx4090", 6), SHAPE), profile_of("rtx4090", 6))
    assert said.low_tokens_per_s < said.tokens_per_s < said.high_tokens_per_s
    assert "modelled, not measured" in said.origin
    assert "20 to 250 us" in said.origin
    assert "3 drawn chats" in said.origin


def test_a_measured_host_leaves_the_chats_alone_in_the_band() -> None:
    profile = replace(profile_of("rtx4090", 6), host_layer_s=Reading(100e-6, "measured"))
    said = foretell(SHAPE, plan_memory(profile, SHAPE), profile)
    assert "host time" not in said.origin


def test_without_slots_experts_are_computed_in_place() -> None:
    profile = replace(profile_of("rtx4090", 6), device_kind="cpu")
    said, plan = foretold(profile)
    assert plan.slots == 0
    assert 0 < said.tokens_per_s < 100


def test_the_nearest_table_is_the_model_s_own_where_there_is_one() -> None:
    for statistics in STATISTICS.values():
        shape = replace(SHAPE, experts=(statistics.experts,) * 40, top_k=statistics.top_k)
        found = nearest(shape)
        known = STATISTICS[found.name]
        assert (known.experts, known.top_k) == (statistics.experts, statistics.top_k)
        assert found.layers <= 12
    odd = nearest(replace(SHAPE, experts=(512,) * 48, top_k=10))
    assert (odd.experts, odd.top_k) == (512, 10)


def test_the_disk_reads_more_the_less_ram_holds() -> None:
    read = [foretold(profile_of("rtx4090", 5, ram_gib=ram))[0] for ram in (11, 8, 5, 3)]
    amounts = [one.disk_bytes_per_token for one in read]
    assert amounts == sorted(amounts)
    assert amounts[-1] > 1.5 * amounts[1] > 0
    speeds = [one.tokens_per_s for one in read]
    assert speeds == sorted(speeds, reverse=True)
    # No token comes faster than what the disk reads for it.
    for one in read:
        if one.disk_bytes_per_token:
            assert one.tokens_per_s < 1.01 * 5e9 / one.disk_bytes_per_token
