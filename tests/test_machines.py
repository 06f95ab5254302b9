"""Machines by their parts: rates in the published ranges, and nothing sold as measured."""

from __future__ import annotations

from dataclasses import fields

import pytest

from runtime.core import Reading
from runtime.machines import (
    CARDS,
    CPUS,
    HOST_LAYER_S,
    LINKS,
    MACHINES,
    Machine,
    tokens_per_pass,
    while_copying,
)


@pytest.mark.parametrize("name", MACHINES)
def test_a_preset_is_made_of_known_parts_and_every_reading_is_assumed(name: str) -> None:
    preset = MACHINES[name]
    assert preset.link in CARDS[preset.card].links
    assert preset.host_layer_s in HOST_LAYER_S
    profile = preset.profile()
    readings = [getattr(profile, field.name) for field in fields(profile)]
    readings = [reading for reading in readings if isinstance(reading, Reading)]
    assert len(readings) == 13
    assert all(reading.source == "assumed" and reading.value > 0 for reading in readings)
    assert profile.device_kind == "emulated"


@pytest.mark.parametrize(
    ("alone", "link", "published"), [(65.8, 25.1, 43.4), (62.0, 57.0, 37.0), (64.0, 24.0, 54.0)]
)
def test_the_cpu_beside_a_copy_is_near_the_published_pairs(
    alone: float, link: float, published: float
) -> None:
    assert while_copying(alone, link) == pytest.approx(published, rel=0.2)


def test_the_cpu_keeps_more_beside_a_slow_link_and_never_gains() -> None:
    for cpu in CPUS.values():
        left = [while_copying(cpu.expert_bytes_per_s, link) for link in sorted(LINKS.values())]
        assert left == sorted(left, reverse=True)
        assert 0.55 * cpu.expert_bytes_per_s <= left[-1]
        assert left[0] < cpu.expert_bytes_per_s


def test_no_card_has_a_faster_link_than_its_slot() -> None:
    assert "pcie5x16" not in CARDS["rtx4090"].links
    assert "pcie5x16" in CARDS["rtx5090"].links
    assert all(link in LINKS for card in CARDS.values() for link in card.links)


def test_dense_time_follows_the_model_and_tokens_per_pass_the_format() -> None:
    desktop = MACHINES["rtx4090"]
    small, large = (desktop.profile(layer_dense_bytes=size) for size in (10**7, 10**8))
    assert large.device_layer_s.value == pytest.approx(10 * small.device_layer_s.value)
    assert small.device_layer_s.value == pytest.approx(10**7 / (0.85 * 1008e9))
    wide, narrow = (desktop.profile(weight_bits=bits) for bits in (16.0, 4.5))
    # Fewer bits are read sooner but take as long to multiply: batches pay off less.
    assert narrow.cpu_tokens_per_pass.value < wide.cpu_tokens_per_pass.value / 3
    assert narrow.device_tokens_per_pass.value < wide.device_tokens_per_pass.value


def test_one_token_more_costs_what_the_timings_say() -> None:
    """One core of the study: 1.02 ms for one token of a bf16 expert, 2.24 ms for 16."""
    rate = 4.72e6 * 2 / 1.02e-3
    per_pass = tokens_per_pass(116e9, rate, 16.0)
    assert 1.02e-3 * (1 + 15 / per_pass) == pytest.approx(2.24e-3, rel=0.05)


def test_a_machine_is_named_by_its_axes() -> None:
    names = {
        Machine(card, link, cpu, host_s).name
        for card in CARDS
        for link in LINKS
        for cpu in CPUS
        for host_s in HOST_LAYER_S
    }
    assert len(names) == len(CARDS) * len(LINKS) * len(CPUS) * len(HOST_LAYER_S)
