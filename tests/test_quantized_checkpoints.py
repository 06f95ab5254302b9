"""Quantised checkpoints run as the same model with plain weights does, in each file format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.core import ExpertId
from runtime.kernels import views
from runtime.loader import LoadedModel, read_shape
from runtime.weight_forms import dequantise, held
from tests.checkpoints import attach_plain_runner, load, load_reference, logits
from tests.quantized_files import FILE_FORMATS, write_quantised

KINDS = {"fp8": "fp8", "int8": "int8", "int4": "int4", "awq": "int4", "gptq": "int4"} | {
    "gptq, 8 bits": "int8",
    "mxfp4": "mxfp4",
    "int8 groups, packed": "int8",
}


def expert_weights(loaded: LoadedModel, layer: int, expert: int) -> dict[str, Tensor]:
    """Return the plain weights that the store's bytes of an expert stand for."""
    layout = loaded.layers[layer].format
    parts = views(loaded.store.bytes_of(ExpertId(layer, expert)), layout)
    dtype = next(loaded.model.parameters()).dtype
    plain = {name: dequantise(held(m, parts), dtype) for m in layout.matrices for name in [m.name]}
    quantised = tuple(f"{matrix.name}." for matrix in layout.matrices)
    for name, part in parts.items():
        if name not in plain and not name.startswith(quantised):
            plain[name] = part
    return plain


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_weights_and_logits_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    file_format = FILE_FORMATS[name]
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    config = write_quantised(file_format, folder, plain)
    reference = load_reference(plain, config)
    loaded = load(folder)

    transposed = loaded.layers[0].math.transposed
    for layer in loaded.layers:
        kinds = {matrix.form.kind for matrix in layer.format.matrices}
        assert kinds == {KINDS.get(name) or KINDS[name.split()[0].rstrip(",")]}
        assert {m.name for m in layer.format.matrices} == {"gate_up_proj", "down_proj"}
        stock = reference.get_submodule(layer.name)
        for expert in range(layer.experts):
            for part, weight in expert_weights(loaded, layer.index, expert).items():
                expected = getattr(stock, part)[expert]
                if transposed and part in ("gate_up_proj", "down_proj"):
                    expected = expected.t()
                assert torch.equal(weight, expected), (layer.index, expert, part)
    stock_parameters = dict(reference.named_parameters())
    for parameter, weight in loaded.model.named_parameters():
        assert torch.equal(weight, stock_parameters[parameter]), parameter

    expected_logits = logits(reference)
    attach_plain_runner(loaded.layers, loaded.store)
    actual_logits = logits(loaded.model)
    for expected, actual in zip(expected_logits, actual_logits, strict=True):
        assert torch.isfinite(expected).all()
        assert expected.std() > 0.03
        if transposed:
            # The reference multiplies by (inputs, outputs) and may add up in another order.
            assert (expected - actual).abs().max() <= 0.02 * expected.abs().max()
        else:
            assert torch.equal(expected, actual)

    assert read_shape(folder) == loaded.shape
    assert loaded.shape.expert_bytes == loaded.store.slot_bytes
    assert loaded.shape.expert_bytes < 0.9 * read_shape(plain).expert_bytes
