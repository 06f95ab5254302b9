"""Loading, and the promise that stripped experts compute exactly what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.adapter import MoeLayer, attach
from runtime.core import ExpertId
from runtime.kernels import combine, rows_of, views
from runtime.loader import LoadedModel, load_model
from runtime.store import ExpertStore
from tests.checkpoints import load_reference
from tests.families import FAMILIES, MORE_FAMILIES, make_checkpoint


def load(folder: Path, **options: Any) -> LoadedModel:
    chosen: dict[str, Any] = {
        "torch_device": torch.device("cpu"),
        "dtype": None,
        "allocate_host": lambda size: torch.empty(size, dtype=torch.uint8),
        "progress": lambda step: None,
        "cancelled": lambda: False,
    }
    return load_model(folder, **chosen | options)


def attach_plain_runner(layers: tuple[MoeLayer, ...], store: ExpertStore) -> None:
    """Run experts in the plainest way that keeps the promise: from the store, one by one."""

    def run(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        math, layout = layers[layer].math, layers[layer].format
        dtype = math.row_dtype(hidden.dtype, weights.dtype)
        rows = torch.zeros((index.numel(), hidden.shape[-1]), dtype=dtype)
        for expert in index.unique().tolist():
            tokens, positions = rows_of(index, expert)
            parts = views(store.bytes_of(ExpertId(layer, expert)), layout)
            rows[tokens * index.shape[1] + positions] = math.rows(
                parts, hidden[tokens], weights[tokens, positions, None]
            )
        return combine(rows, index, hidden.dtype)

    attach(layers, run)


def logits(model: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of a prompt of 2x13 tokens and of one cached step after it."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 150, (2, 13), generator=generator)
    token = torch.randint(3, 150, (2, 1), generator=generator)
    with torch.inference_mode():
        first = model(input_ids=prompt, use_cache=True)
        second = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
    return first.logits, second.logits


def check_family(family: str, folder: Path) -> None:
    """Assert that a stripped model gives the very logits of the stock one."""
    make_checkpoint(family, folder)
    expected = logits(load_reference(folder, (FAMILIES | MORE_FAMILIES)[family]()))
    loaded = load(folder)
    attach_plain_runner(loaded.layers, loaded.store)
    actual = logits(loaded.model)
    assert all(torch.isfinite(step).all() and step.std() > 0.03 for step in expected)
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_to_the_last_bit(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_logits_of_every_other_family_are_equal_too(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)
