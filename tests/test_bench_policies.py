"""`bench policies`: its cells were chosen before its results, and its figures add up."""

from __future__ import annotations

import hashlib
from collections import Counter

from runtime.bench.policies_cells import (
    BATCHES,
    CELLS_FILE,
    FULL_SHARE,
    MAIN_MODELS,
    PAPER_BATCHES,
    PAPER_MACHINE,
    PAPER_RESIDENCIES,
    PHASES,
    RESERVE_BYTES,
    RESIDENCIES,
    cells_by_rule,
    fixed_cells,
    full_cells,
    machines,
    quick_cells,
)
from runtime.bench.policies_models import MODELS
from runtime.machines import CARDS, CPUS, HOST_LAYER_S, LINKS

CELLS_SHA256 = "14016f3bcd4738046e277b2a2aae863431d56b98985ec282e18466ecec7c6298"


def test_the_cells_are_those_that_were_committed_before_any_result() -> None:
    assert hashlib.sha256(CELLS_FILE.read_bytes()).hexdigest() == CELLS_SHA256
    assert fixed_cells() == cells_by_rule()
    assert len(set(fixed_cells())) == len(fixed_cells()) == 306


def test_both_phases_cover_every_value_of_every_axis() -> None:
    for phase in PHASES:
        cells = [c for c in fixed_cells() if c.phase == phase and c.setting == "main"]
        strata = Counter((c.model, c.residency, c.batch) for c in cells)
        assert len(strata) == len(MAIN_MODELS) * len(RESIDENCIES) * len(BATCHES)
        assert len(set(strata.values())) == 1
        # Links are balanced exactly; what has to fit the card only roughly.
        assert len(set(Counter(c.machine.link for c in cells).values())) == 1
        for values, axis in (
            (CARDS, [c.machine.card for c in cells]),
            (LINKS, [c.machine.link for c in cells]),
            (CPUS, [c.machine.cpu for c in cells]),
            (HOST_LAYER_S, [c.machine.host_layer_s for c in cells]),
        ):
            seen = Counter(axis)
            assert set(seen) == set(values)
            assert min(seen.values()) >= len(cells) / len(values) / 3
        for link in LINKS:
            assert {c.batch for c in cells if c.machine.link == link} == set(BATCHES)


def test_slots_fit_the_card_but_where_none_can_hold_them() -> None:
    largest = max(card.vram_bytes for card in CARDS.values())
    for cell in fixed_cells():
        if not cell.fits:
            assert (cell.model, cell.residency) == ("gpt-oss-120b", 0.5)
            assert CARDS[cell.machine.card].vram_bytes == largest


def test_the_paper_cells_are_the_largest_that_its_card_holds() -> None:
    kv_bytes_per_token = {
        "Mixtral-8x7B bf16": 32 * 2 * 1024 * 2,
        "DeepSeek-V2-Lite bf16": 27 * (512 + 64) * 2,
        "Qwen3-30B-A3B bf16": 48 * 2 * 512 * 2,
    }
    for name, residencies in PAPER_RESIDENCIES.items():
        model = MODELS[name]
        fixed_bytes = model.dense_bytes + 64 * 576 * kv_bytes_per_token[name] + RESERVE_BYTES
        holds = [
            share
            for share in RESIDENCIES
            if fixed_bytes + share * model.experts_bytes <= CARDS[PAPER_MACHINE.card].vram_bytes
        ]
        assert tuple(holds[-2:]) == residencies
    paper = [c for c in fixed_cells() if c.setting == "paper"]
    assert len(paper) == 2 * len(PAPER_RESIDENCIES) * len(PAPER_BATCHES)
    assert {(c.machine, c.phase) for c in paper} == {(PAPER_MACHINE, "decode")}


def test_quick_is_a_subset_with_every_model_batch_and_phase() -> None:
    quick = quick_cells(fixed_cells())
    assert set(quick) < set(fixed_cells())
    decode = {(c.model, c.batch) for c in quick if c.phase == "decode" and c.setting == "main"}
    assert len(decode) == len(MAIN_MODELS) * len(BATCHES)
    assert {c.model for c in quick if c.phase == "prefill"} == set(MAIN_MODELS)
    assert {c.machine.link for c in quick} == set(LINKS)
    assert {c.setting for c in quick} == {"main", "paper"}


def test_full_is_an_even_sample_of_the_whole_cross() -> None:
    full = [cell for cell in full_cells() if cell.setting == "main"]
    cross = len(machines()) * len(MAIN_MODELS) * len(RESIDENCIES) * len(BATCHES) * len(PHASES)
    assert 0.7 * cross / FULL_SHARE < len(full) < 1.1 * cross / FULL_SHARE
    assert {cell.machine for cell in full} == set(machines())
    assert all(cell.fits for cell in full)
