"""Experts arrive in their slabs byte for byte, whatever detour their files ask for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError, MemoryPlanError, ModelFilesError
from runtime.formats import lay_out
from runtime.kernels import views
from runtime.safetensors_files import SINGLE_NAME, SafetensorsFiles
from runtime.store import Conversion, ExpertStore, LayerSource, Piece, Recipe

EXPERTS, INNER, HIDDEN = 4, 3, 5


def allocate(size: int) -> Tensor:
    return torch.full((size,), 0xDB, dtype=torch.uint8)


def fill(
    folder: Path,
    tensors: dict[str, Tensor],
    layers: Sequence[LayerSource],
    **options: Any,
) -> ExpertStore:
    save_file(tensors, folder / SINGLE_NAME)
    files = SafetensorsFiles(folder)
    chosen: dict[str, Any] = {
        "allocate_host": allocate,
        "progress": lambda step: None,
        "cancelled": lambda: False,
    }
    try:
        return ExpertStore(files, layers, **chosen | options)
    finally:
        files.close()


def merged(dtype: str, recipe: Callable[[int], Recipe]) -> LayerSource:
    layout = lay_out([("gate_up", (2 * INNER, HIDDEN), dtype), ("down", (HIDDEN, INNER), dtype)])
    return LayerSource(layout, tuple(recipe(expert) for expert in range(EXPERTS)))


def per_expert(expert: int) -> Recipe:
    items = INNER * HIDDEN
    return (
        Piece("gate_up", f"{expert}.gate", 0, items, 0),
        Piece("gate_up", f"{expert}.up", 0, items, items),
        Piece("down", f"{expert}.down", 0, items, 0),
    )


def random_experts(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {
        f"{expert}.{name}": torch.randn(shape).to(dtype)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_gate_and_up_become_the_rows_of_one_part(
    stored: torch.dtype, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.store_recipes._SCRATCH_ITEMS", 4)
    tensors = random_experts(stored)
    layer = merged(wanted, per_expert)
    store = fill(tmp_path, tensors, [layer, layer])
    for number in range(2):
        for expert in range(EXPERTS):
            raw = store.bytes_of(ExpertId(number, expert))
            assert raw.shape == (layer.format.size_bytes,)
            parts = views(raw, layer.format)
            gate_up = torch.cat([tensors[f"{expert}.gate"], tensors[f"{expert}.up"]])
            assert torch.equal(parts["gate_up"], gate_up.to(getattr(torch, wanted)))
            assert torch.equal(parts["down"], tensors[f"{expert}.down"].to(parts["down"].dtype))


def test_slices_of_one_tensor_and_conversions_reach_the_right_expert(tmp_path: Path) -> None:
    stacked = torch.randn(EXPERTS, 2 * INNER, HIDDEN)
    turned = torch.randn(EXPERTS, INNER, HIDDEN)

    def transpose(inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0][0].T

    def recipe(expert: int) -> Recipe:
        items = 2 * INNER * HIDDEN
        return (
            Piece("gate_up", "stacked", expert * items, items, 0),
            Conversion("down", (("turned", expert),), transpose),
        )

    layer = merged("float32", recipe)
    store = fill(tmp_path, {"stacked": stacked, "turned": turned}, [layer])
    for expert in range(EXPERTS):
        parts = views(store.bytes_of(ExpertId(0, expert)), layer.format)
        assert torch.equal(parts["gate_up"], stacked[expert])
        assert torch.equal(parts["down"], turned[expert].T)


def test_the_store_states_its_sizes_and_reports_progress(tmp_path: Path) -> None:
    layer = merged("float32", per_expert)
    steps: list[LoadProgress] = []
    store = fill(tmp_path, random_experts(torch.float32), [layer, layer], progress=steps.append)
    assert store.slot_bytes == layer.format.size_bytes
    assert store.ram_bytes == 2 * EXPERTS * layer.format.size_bytes
    assert store.format_of(1) is layer.format
    done = [step.done_bytes for step in steps]
    assert done == sorted(done)
    assert steps[-1].done_bytes == steps[-1].total_bytes == store.ram_bytes


@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_cancelling_gives_every_slab_back(after: int, tmp_path: Path) -> None:
    asked, slabs = [0], []

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > after

    def watched(size: int) -> Tensor:
        slab = allocate(size)
        slabs.append(weakref.ref(slab))
        return slab

    layer = merged("float32", per_expert)
    with pytest.raises(CancelledError):
        fill(
            tmp_path,
            random_experts(torch.float32),
            [layer, layer],
            cancelled=cancelled,
            allocate_host=watched,
        )
    assert slabs or not after
    assert all(slab() is None for slab in slabs)


def test_closing_gives_every_slab_back(tmp_path: Path) -> None:
    store = fill(tmp_path, random_experts(torch.float32), [merged("float32", per_expert)])
    slab = weakref.ref(store.bytes_of(ExpertId(0, 0)).untyped_storage())
    store.close()
    store.close()
    assert slab() is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no room")])
def test_no_room_for_a_slab_is_said_in_numbers(error: Exception, tmp_path: Path) -> None:
    def refuse(size: int) -> Tensor:
        raise error

    with pytest.raises(MemoryPlanError, match=r"\d+\.\d\d GiB"):
        fill(
            tmp_path,
            random_experts(torch.float32),
            [merged("float32", per_expert)],
            allocate_host=refuse,
        )


def test_a_file_cut_during_the_load_is_an_error(tmp_path: Path) -> None:
    def cut() -> bool:
        with (tmp_path / SINGLE_NAME).open("r+b") as file:
            file.truncate(1200)
        return False

    with pytest.raises(ModelFilesError, match="ends at byte|was changed"):
        fill(
            tmp_path,
            random_experts(torch.float32),
            [merged("float32", per_expert)],
            cancelled=cut,
        )
