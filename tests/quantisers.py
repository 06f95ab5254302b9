"""A plain quantiser for tests: each group of a row between its smallest and its largest number."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.expert_file_making import Quantiser
from runtime.formats import Form, FormKind
from runtime.weight_forms import Codes


def plain_quantiser(kind: FormKind, columns: int = 8) -> Quantiser:
    """Return one whose groups have `columns` inputs; other matrices stay as they are."""

    def form_of(shape: tuple[int, int]) -> Form | None:
        return None if shape[1] % columns else Form(kind, columns=columns, zeros=True)

    return Quantiser(kind, form_of, _quantise)


def _quantise(matrix: Tensor, form: Form) -> Codes:
    levels = 15 if form.kind == "int4" else 255
    blocks = matrix.float().unflatten(1, (-1, form.columns))
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    scales = (high - low).clamp(min=1e-9) / levels
    steps = ((blocks - low) / scales).round()
    middle = 8 if form.kind == "int4" else 128
    zeros = (low + middle * scales).squeeze(2)
    numbers = steps if form.kind == "int4" else steps - middle
    dtype = torch.uint8 if form.kind == "int4" else torch.int8
    return Codes(form, numbers.to(dtype).flatten(1), scales.squeeze(2), zeros)
