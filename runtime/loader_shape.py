"""The sizes of a model before it is loaded, or even downloaded: its config.json is enough.

With the weights' files at hand their own sizes count; without them the skeleton and what the
configuration says of quantisation stand in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from runtime.adapter import MoeLayer, expert_shapes, find_moe_layers
from runtime.adapter_config import CONFIG_NAME, build_skeleton, read_config, read_quantisation
from runtime.adapter_config import stored_dtype as dtype_in
from runtime.adapter_shape import model_shape
from runtime.core import ExpertsWish, ModelShape
from runtime.expert_file_making import Quantiser, quantised_layer
from runtime.formats import Form
from runtime.gguf_files import is_gguf
from runtime.loader import read_shape
from runtime.loader_experts import quantiser_for
from runtime.quantized_schemes import Scheme

_MXFP4_COLUMNS = 32


@dataclass(frozen=True)
class ForeseenShape:
    """A shape, how its experts are held, and how many weights one expert has.

    `from_files` says that the weights are on this disk.
    """

    shape: ModelShape
    form: str
    expert_weights: int
    from_files: bool

    @property
    def weight_bits(self) -> float:
        return 8 * self.shape.expert_bytes / self.expert_weights


def foresee_shape(
    path: Path,
    dtype: torch.dtype | None = None,
    wish: ExpertsWish = "as stored",
    half: torch.dtype = torch.bfloat16,
) -> ForeseenShape:
    """Return the sizes of the model at `path`: a folder, a GGUF file, or a config.json alone.

    `dtype` None takes the one that the configuration names, else bfloat16, and `half` for quantised
    weights of which it names float16. `wish` is for experts that are not quantised.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
    """
    if is_gguf(path):
        shape = read_shape(path, dtype, wish)
        return ForeseenShape(shape, "gguf", 2 * shape.expert_bytes, True)
    folder = path.parent if path.name == CONFIG_NAME else path
    config = read_config(folder, half)
    dtype = dtype or dtype_in(config) or torch.bfloat16
    skeleton = build_skeleton(config, dtype)
    layers = find_moe_layers(skeleton, dtype)
    weights = max(
        sum(math.prod(shape[1:]) for shape in expert_shapes(layer.module).values())
        for layer in layers
    )
    quantisation = read_quantisation(folder)
    form = str(dtype).removeprefix("torch.")
    from_files = any(folder.glob("*.safetensors"))
    if quantisation is not None:
        form = quantisation.method
        layers = _held(layers, [_sizes_only(_form(scheme)) for scheme in quantisation.schemes])
    elif wish != "as stored":
        form = wish
        layers = _held(layers, [quantiser_for(wish)])
    if from_files:
        shape = read_shape(folder, dtype, wish, half)
    else:
        shape = model_shape(folder.name, skeleton, layers)
    return ForeseenShape(shape, form, weights, from_files)


def _held(layers: Sequence[MoeLayer], quantisers: Sequence[Quantiser]) -> list[MoeLayer]:
    """Return the layers with their experts as they are held by the least saving of these."""
    held = []
    for layer in layers:
        weights = (layer.math.up, layer.math.down)
        choices = [
            quantised_layer(
                layer.experts, layer.format, weights, layer.math.transposed, quantiser
            ).held
            for quantiser in quantisers
        ]
        largest = max(choices, key=lambda choice: choice.size_bytes)
        held.append(replace(layer, format=largest))
    return held


def _form(scheme: Scheme) -> Form:
    """Return how a matrix of this scheme is held; unknown rows are taken to be one by one."""
    if scheme.floating and scheme.bits == 4:
        return Form("mxfp4", columns=_MXFP4_COLUMNS)
    if scheme.floating:
        return Form("fp8", max(1, scheme.rows), scheme.columns)
    return Form("int4" if scheme.bits == 4 else "int8", 1, scheme.columns, scheme.zeros)


def _sizes_only(form: Form) -> Quantiser:
    def never(matrix: Tensor, form: Form) -> NoReturn:
        raise AssertionError("only sizes are asked for")

    return Quantiser(form.kind, lambda shape: form, never)
