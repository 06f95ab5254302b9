"""Quantising plain matrices of experts to int8 and int4, in the forms a CPU multiplies by fast.

int8: a scale per row, symmetric, which torch's eight-bit op wants. int4: a scale and a zero per
group of inputs, from the group's smallest and largest number, then fitted once by least squares to
the numbers that came out of it. On normally distributed weights the fit lowers the error by 3 %
(groups of 64) for a third more time; a search over narrower ranges on top costs ten times as much
for another 3 %. Scales are rounded as they are held before numbers are chosen for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtime.formats import Form, FormKind
from runtime.weight_forms import Codes

INT4_COLUMNS = (64, 32, 128)
"""Sizes of groups by preference: half a bit per weight for the scales, then what divides."""
_INT8_COLUMNS = 16
_PIECE_ITEMS = 2**17
_LARGEST_FITTED = 512
"""Sums over more numbers would be split otherwise than `runtime.quantize_loops` does."""


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
    # Only those who quantise wait for numba to be imported.
    from runtime import quantize_loops as loops

    assert form.kind in ("int8", "int4"), form
    assert form.rows == 1, form
    rows, columns = matrix.shape
    width = form.columns or columns
    assert columns % width == 0, (matrix.shape, form)
    assert not form.zeros or width % 32 == 0 and width <= _LARGEST_FITTED, form
    assert form.scale_dtype in ("float32", "bfloat16"), form
    least, most = (-8, 7) if form.kind == "int4" else (-128, 127)
    low, high = np.float32(least), np.float32(most)
    more = np.float32(-least if form.kind == "int4" else 0)
    rounds = form.scale_dtype == "bfloat16"
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, columns // width))
    zeros = torch.empty((rows, columns // width)) if form.zeros else None
    step = max(1, _PIECE_ITEMS // columns)
    piece_numbers = torch.empty((step, columns))
    for begin in range(0, rows, step):
        piece = slice(begin, begin + step)
        some = matrix[piece]
        numbers = piece_numbers[: len(some)].copy_(some).numpy()
        into, steps = codes[piece].numpy(), scales[piece].numpy()
        if zeros is None:
            bits = numbers.view(np.uint32)
            loops.symmetric(numbers, bits, width, low, high, more, rounds, into, steps)
        else:
            signed, offsets = numbers.view(np.int32), zeros[piece].numpy()
            loops.fitted(numbers, signed, width, low, high, more, rounds, into, steps, offsets)
    if form.kind == "int4":
        codes = codes.view(torch.uint8)
    return Codes(form, codes, scales, zeros)
