"""Quantised matrices of experts: what their numbers mean, and the parts that hold them in a slot.

`Codes` is the meaning, the same whatever file it came from. `parts_of`, `encode` and `held` are
the only places that know how it lies in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.formats import Form, Matrix

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_VALUES = (*_E2M1, *(-value for value in _E2M1))
MXFP4_COLUMNS = 32


@dataclass(frozen=True)
class Codes:
    """A quantised matrix (outputs N, inputs K): value(code) * scale of its block + its zero.

    Code and value by kind: int8: int8 (N, K), itself. int4: uint8 (N, K) of 0 to 15, code - 8.
    fp8: float8_e4m3fn (N, K), itself. mxfp4: uint8 (N, K) of 0 to 15, an e2m1 number.
    `scales` and `zeros`: float32 (ceil(N / rows), ceil(K / columns)); `zeros` None where the form
    has none.
    """

    form: Form
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def dequantise(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Return the matrix (N, K) that `codes` stands for: computed in float32, rounded once."""
    kind = codes.form.kind
    if kind == "mxfp4":
        values = torch.tensor(MXFP4_VALUES, device=codes.codes.device)[codes.codes.long()]
    elif kind == "int4":
        values = codes.codes.float() - 8
    else:
        values = codes.codes.float()
    rows, columns = values.shape
    values = values * _spread(codes.scales, codes.form, rows, columns)
    if codes.zeros is not None:
        values = values + _spread(codes.zeros, codes.form, rows, columns)
    return values.to(dtype)


def _spread(blocks: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    wide = blocks.repeat_interleave(form.rows, 0)[:rows]
    return wide.repeat_interleave(form.columns or columns, 1)[:, :columns]


def parts_of(matrix: Matrix) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of the tensors that hold `matrix`, for `lay_out`."""
    (rows, columns), form = matrix.shape, matrix.form
    four_bits = form.kind in ("int4", "mxfp4")
    dtype = {"int8": "int8", "fp8": "float8_e4m3fn"}.get(form.kind, "uint8")
    blocks = (-(-rows // form.rows), -(-columns // (form.columns or columns)))
    parts: list[tuple[str, tuple[int, ...], str]] = [
        (matrix.name, (rows, columns // 2 if four_bits else columns), dtype)
    ]
    parts.append((f"{matrix.name}.scales", blocks, "float32"))
    if form.zeros:
        parts.append((f"{matrix.name}.zeros", blocks, "float32"))
    return parts


def encode(codes: Codes, matrix: Matrix, parts: Mapping[str, Tensor]) -> None:
    """Write `codes` into the parts of `matrix`, typed views as `kernels.views` makes them."""
    assert codes.form == matrix.form, (codes.form, matrix)
    numbers = codes.codes
    if matrix.form.kind in ("int4", "mxfp4"):
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    parts[matrix.name].copy_(numbers)
    parts[f"{matrix.name}.scales"].copy_(codes.scales)
    if codes.zeros is not None:
        parts[f"{matrix.name}.zeros"].copy_(codes.zeros)


def held(matrix: Matrix, parts: Mapping[str, Tensor]) -> Codes:
    """Return the codes that `encode` wrote."""
    numbers = parts[matrix.name]
    if matrix.form.kind in ("int4", "mxfp4"):
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=2).flatten(1)
    zeros = parts[f"{matrix.name}.zeros"] if matrix.form.zeros else None
    return Codes(matrix.form, numbers, parts[f"{matrix.name}.scales"], zeros)
