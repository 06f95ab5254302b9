"""Recipes for experts whose matrices the files hold quantised: unpack, join, encode.

Each step reads the bytes of one expert and no other, and can be carried out again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from runtime import quantized_codes
from runtime.adapter import MoeLayer
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.formats import DTYPE_BYTES, Form, Matrix, Part
from runtime.quantized_tensors import QuantisedTensor
from runtime.safetensors_files import TensorEntry
from runtime.store_recipes import RAW_DTYPES, Encoding, LayerSource, Piece, Recipe
from runtime.weight_forms import PIECE_ROWS, Codes, form_for, parts_of

Bytes = NDArray[np.uint8]

_AGAIN = "Download the model again, or choose another one."
_OTHER = "Choose another version of this model, such as one in bfloat16 or GGUF."


def with_held_formats(
    layers: Sequence[MoeLayer], sources: Sequence[LayerSource]
) -> tuple[MoeLayer, ...]:
    """Return `layers` with the formats in which the store will hold their experts."""
    pairs = zip(layers, sources, strict=True)
    return tuple(replace(layer, format=source.format) for layer, source in pairs)


def quantised_part(
    lists: Sequence[Sequence[TensorEntry | QuantisedTensor]], layer: MoeLayer, part: Part
) -> tuple[Matrix, list[Recipe]]:
    """Return how `part` is held and, for each expert, the step that fills all that holds it.

    `lists` are tensors that lie below each other in the part, each list in the order of experts,
    or a single tensor with the experts as its first axis.

    Raises:
        ModelFilesError: shapes or forms do not fit.
        UnsupportedModelError: quantised in a way that cannot be held.
    """
    name = f"{layer.name}.{part.name}"
    tensors: list[list[QuantisedTensor]] = []
    for column in lists:
        quantised = [tensor for tensor in column if isinstance(tensor, QuantisedTensor)]
        if len(quantised) != len(column):
            plain = next(t.name for t in column if not isinstance(t, QuantisedTensor))
            _unsupported(name, f"{plain} is not quantised, but {quantised[0].name} is")
        tensors.append(quantised)
    if len(tensors) == 1 and len(tensors[0]) == 1 and len(tensors[0][0].shape) == 3:
        return _fused(tensors[0][0], layer, part)
    if layer.math.transposed:
        _unsupported(name, "it keeps inputs before outputs")
    form, outputs = _agreed(name, [column[0] for column in tensors])
    matrix = _matrix(part, (outputs, tensors[0][0].shape[-1]), form)
    recipes: list[Recipe] = []
    for expert in range(layer.experts):
        pieces = [column[expert] for column in tensors]
        if _agreed(name, pieces) != (form, outputs):
            _unsupported(name, f"expert {expert} is quantised otherwise than expert 0")
        for piece in pieces:
            if len(piece.shape) != 2 or piece.shape[1:] != part.shape[1:]:
                _wrong(name, f"{piece.name} has the shape {piece.shape}")
        recipes.append(_steps(matrix, form, pieces, 0))
    if (outputs, *part.shape[1:]) != part.shape:
        _wrong(name, f"an expert has {outputs} rows in the files instead of {part.shape[0]}")
    return matrix, recipes


def _fused(tensor: QuantisedTensor, layer: MoeLayer, part: Part) -> tuple[Matrix, list[Recipe]]:
    name = f"{layer.name}.{part.name}"
    shape = part.shape
    if layer.math.transposed:
        # Only MXFP4 files are known to have outputs first where the module has them last.
        if tensor.form.kind != "mxfp4":
            _unsupported(name, "it keeps inputs before outputs")
        shape = shape[::-1]
    if tensor.shape != (layer.experts, *shape):
        wanted = (layer.experts, *shape)
        _wrong(name, f"{tensor.name} has the shape {tensor.shape} instead of {wanted}")
    matrix = _matrix(part, (shape[0], shape[1]), tensor.form)
    return matrix, [_steps(matrix, tensor.form, [tensor], e) for e in range(layer.experts)]


def _matrix(part: Part, shape: tuple[int, int], form: Form) -> Matrix:
    dtype: torch.dtype = getattr(torch, part.dtype)
    return Matrix(part.name, shape, form_for(form, dtype))


def _steps(matrix: Matrix, form: Form, pieces: Sequence[QuantisedTensor], expert: int) -> Recipe:
    """Return the steps that put `pieces`, each number `expert` of its tensor, below each other."""
    straight = _straight(matrix, pieces, expert)
    if straight is not None:
        return straight
    if any(piece.shape[-2] % PIECE_ROWS for piece in pieces[:-1]):
        inputs = tuple(read for piece in pieces for read in piece.inputs(expert))
        return (Encoding(matrix, inputs, partial(_joined, form, pieces)),)
    steps = []
    first = 0
    for piece in pieces:
        steps.append(Encoding(matrix, piece.inputs(expert), partial(_alone, form, piece), first))
        first += piece.shape[-2]
    return tuple(steps)


def _straight(matrix: Matrix, pieces: Sequence[QuantisedTensor], expert: int) -> Recipe | None:
    """Return plain copies where the parts lie as the files' own tensors do."""
    parts = parts_of(matrix)
    as_stored = all(piece.form.rows == matrix.form.rows for piece in pieces)
    if matrix.form.kind not in ("fp8", "mxfp4") or len(parts) != 2 or not as_stored:
        return None
    steps: list[Piece] = []
    for number, (name, shape, dtype) in enumerate(parts):
        into = 0
        for piece in pieces:
            source = piece.sources[number]
            stored = RAW_DTYPES.get(source.stored, source.dtype)
            if len(piece.sources) != 2 or stored != dtype:
                return None
            items = piece.inputs(expert)[number][2] // DTYPE_BYTES[dtype]
            steps.append(Piece(name, source.name, expert * items, items, into))
            into += items
        if into != math.prod(shape):
            return None
    return tuple(steps)


def _agreed(name: str, pieces: Sequence[QuantisedTensor]) -> tuple[Form, int]:
    outputs = [piece.shape[0] for piece in pieces]
    form = quantized_codes.joined_form([piece.form for piece in pieces], outputs)
    if form is None:
        _unsupported(name, f"{' and '.join(p.name for p in pieces)} are quantised differently")
    return form, sum(outputs)


def _alone(form: Form, piece: QuantisedTensor, raw: Sequence[Bytes]) -> Iterator[Codes]:
    return (quantized_codes.finer(codes, form) for codes in piece.codes(raw))


def _joined(form: Form, pieces: Sequence[QuantisedTensor], raw: Sequence[Bytes]) -> Iterator[Codes]:
    codes: list[Codes] = []
    begin = 0
    for piece in pieces:
        codes += piece.codes(raw[begin : begin + len(piece.sources)])
        begin += len(piece.sources)
    yield quantized_codes.join(form, codes)


def _wrong(parameter: str, what: str) -> NoReturn:
    raise ModelFilesError(f"The files do not fit {parameter}: {what}.", _AGAIN)


def _unsupported(parameter: str, what: str) -> NoReturn:
    raise UnsupportedModelError(f"{parameter} cannot be held quantised: {what}.", _OTHER)
