"""Quantising plain matrices of experts to int8 and int4, in the forms a CPU multiplies by fast.

int8: a scale per row, symmetric, which torch's eight-bit op wants. int4: a scale and a zero per
group of inputs, from the group's smallest and largest number, then fitted once by least squares to
the numbers that came out of it. On normally distributed weights the fit lowers the error by 3 %
(groups of 64) for a third more time; a search over narrower ranges on top costs ten times as much
for another 3 %. Scales are rounded as they are held before numbers are chosen for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.formats import Form, FormKind
from runtime.weight_forms import Codes

INT4_COLUMNS = (64, 32, 128)
"""Sizes of groups by preference: half a bit per weight for the scales, then what divides."""
_INT8_COLUMNS = 16
_PIECE_ITEMS = 2**17
_SMALLEST_SCALE = 1e-30


def form_of(kind: FormKind, shape: tuple[int, int]) -> Form | None:
    """Return how a matrix (outputs, inputs) is held that is to be quantised to `kind`.

    Inputs that no group of four bits divides take eight bits, and those that torch's op cannot
    read stay as they are: None.
    """
    columns = shape[1]
    if kind == "int4":
        for group in INT4_COLUMNS:
            if columns % group == 0:
                return Form("int4", 1, group, zeros=True, scale_dtype="bfloat16")
    if kind in ("int4", "int8") and columns % _INT8_COLUMNS == 0:
        return Form("int8")
    return None


def quantise(matrix: Tensor, form: Form) -> Codes:
    """Return `matrix` (outputs, inputs), of any float dtype, in an int8 or int4 form of row groups.

    Numbers that are not finite are the caller's to refuse: they spoil their group.
    """
    assert form.kind in ("int8", "int4"), form
    assert form.rows == 1, form
    rows, columns = matrix.shape
    width = form.columns or columns
    assert columns % width == 0, (matrix.shape, form)
    # Signed first: torch turns floats into those five times as fast.
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, columns // width))
    zeros = torch.empty((rows, columns // width)) if form.zeros else None
    scale_dtype: torch.dtype = getattr(torch, form.scale_dtype)
    for begin in range(0, rows, max(1, _PIECE_ITEMS // columns)):
        piece = slice(begin, begin + max(1, _PIECE_ITEMS // columns))
        groups = matrix[piece].float().reshape(-1, columns // width, width)
        if zeros is None:
            scale = _symmetric(groups, form.kind, scale_dtype)
            numbers = _nearest(groups, scale, None, form.kind)
        else:
            scale, zero = _range(groups, form.kind, scale_dtype)
            fitted = _fitted(groups, _nearest(groups, scale, zero, form.kind), scale_dtype)
            scale, zero = torch.where(fitted[0] > 0, fitted[0], scale), fitted[1]
            numbers = _nearest(groups, scale, zero, form.kind)
            zeros[piece] = zero.squeeze(2)
        scales[piece] = scale.squeeze(2)
        codes[piece] = numbers.flatten(1)
    if form.kind == "int4":
        codes = codes.view(torch.uint8).add_(8)
    return Codes(form, codes, scales, zeros)


def _limits(kind: FormKind) -> tuple[int, int]:
    return (-8, 7) if kind == "int4" else (-128, 127)


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor | None, kind: FormKind) -> Tensor:
    numbers = groups / scale if zero is None else (groups - zero).div_(scale)
    return numbers.round_().clamp_(*_limits(kind))


def _symmetric(groups: Tensor, kind: FormKind, dtype: torch.dtype) -> Tensor:
    largest = groups.abs().amax(2, keepdim=True)
    return (largest / _limits(kind)[1]).clamp_(min=_SMALLEST_SCALE).to(dtype).float()


def _range(groups: Tensor, kind: FormKind, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # `aminmax` along an axis takes ten times as long as both of them.
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    least, most = _limits(kind)
    scale = ((high - low) / (most - least)).clamp_(min=_SMALLEST_SCALE).to(dtype).float()
    return scale, ((low + high - scale * (least + most)) / 2).to(dtype).float()


def _fitted(groups: Tensor, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and zero with the least squared error for `numbers`; scale 0: all equal.

    Nothing is left of `numbers`.
    """
    middle, mean = numbers.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    apart = numbers.sub_(middle)
    spread = apart.square().sum(2, keepdim=True)
    scale = apart.mul_(groups).sum(2, keepdim=True) / spread.clamp(min=_SMALLEST_SCALE)
    scale = scale.to(dtype).float()
    return scale, (mean - scale * middle).to(dtype).float()
