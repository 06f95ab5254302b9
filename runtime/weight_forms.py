"""Quantised matrices of experts: what their numbers mean, and the parts that hold them in a slot.

`Codes` is the meaning, the same whatever file it came from. `parts_of`, `encode` and `held` are
the only places that know how it lies in memory, beside `runtime.weight_packing` and the kernels
that read it.

A matrix that torch's four-bit CPU op can multiply lies exactly as that op wants it: packed anew at
every use it would cost ten times the multiplication, and a card undoes the permutation in the pass
over the numbers that it makes anyway. The op's layout depends on the CPU, so bytes of a slot are
not portable between machines. Other matrices keep their rows; of two four-bit neighbours the first
is the low nibble.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.formats import Form, Matrix, ScaleDtype
from runtime.weight_packing import pack, unpack

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_VALUES = (*_E2M1, *(-value for value in _E2M1))
MXFP4_COLUMNS = 32
_E8M0_BIAS = 127
_PACKED_COLUMNS = (32, 64, 128, 256)
_PACKED_ROWS = 16


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
        values = _mxfp4_values(codes.codes.device)[codes.codes.int()]
    elif kind == "int4":
        values = codes.codes.float().sub_(8)
    else:
        values = codes.codes.float()
    rows, columns = values.shape
    width = codes.form.columns or columns
    if rows % codes.form.rows == 0 and columns % width == 0:
        # In place and without spreading the scales: one float32 matrix may take half a gigabyte.
        blocks = values.view(rows // codes.form.rows, codes.form.rows, columns // width, width)
        blocks.mul_(codes.scales[:, None, :, None])
        if codes.zeros is not None:
            blocks.add_(codes.zeros[:, None, :, None])
        return values.to(dtype)
    values = values * _spread(codes.scales, codes.form, rows, columns)
    if codes.zeros is not None:
        values = values + _spread(codes.zeros, codes.form, rows, columns)
    return values.to(dtype)


@functools.cache
def _mxfp4_values(device: torch.device) -> Tensor:
    return torch.tensor(MXFP4_VALUES, device=device)


def _spread(blocks: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    wide = blocks.repeat_interleave(form.rows, 0)[:rows]
    return wide.repeat_interleave(form.columns or columns, 1)[:, :columns]


def form_for(form: Form, dtype: torch.dtype) -> Form:
    """Return `form` with scales no finer than weights of `dtype` would be.

    Rounding scales and zeros to bfloat16 moves a weight by at most 2 ** -8 of |scale * value| +
    |zero|, as rounding the dequantised weight does; the four-bit CPU op wants them so.
    """
    grouped = form.kind in ("int4", "int8") and form.rows == 1 and form.columns
    scale_dtype: ScaleDtype = "bfloat16" if grouped and dtype == torch.bfloat16 else "float32"
    return replace(form, scale_dtype=scale_dtype)


def is_packed(matrix: Matrix) -> bool:
    """Say whether the matrix lies as torch's four-bit CPU op reads it.

    An eight-bit one is then two four-bit matrices, `planes` of which the sum is the matrix.
    """
    (rows, columns), form = matrix.shape, matrix.form
    return (
        form.kind in ("int4", "int8")
        and form.rows == 1
        and form.columns in _PACKED_COLUMNS
        and columns % form.columns == 0
        and rows % _PACKED_ROWS == 0
    )


def parts_of(matrix: Matrix) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of the tensors that hold `matrix`, for `lay_out`."""
    (rows, columns), form = matrix.shape, matrix.form
    scales, zeros = f"{matrix.name}.scales", f"{matrix.name}.zeros"
    if is_packed(matrix):
        planes = 2 if form.kind == "int8" else 1
        groups: tuple[int, ...] = (columns // form.columns, rows)
        if form.zeros:
            groups = (*groups, 2)
        numbers = (matrix.name, (planes * rows, columns // 2), "uint8")
        return [numbers, (scales, groups, form.scale_dtype)]
    blocks = (-(-rows // form.rows), -(-columns // (form.columns or columns)))
    if form.kind == "mxfp4":
        return [(matrix.name, (rows, -(-columns // 2)), "uint8"), (scales, blocks, "uint8")]
    dtype = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}[form.kind]
    width = -(-columns // 2) if form.kind == "int4" else columns
    parts: list[tuple[str, tuple[int, ...], str]] = [
        (matrix.name, (rows, width), dtype),
        (scales, blocks, form.scale_dtype),
    ]
    if form.zeros:
        parts.append((zeros, blocks, form.scale_dtype))
    return parts


def encode(codes: Codes, matrix: Matrix, parts: Mapping[str, Tensor]) -> None:
    """Write `codes` into the parts of `matrix`, typed views as `kernels.views` makes them.

    The form of `codes` is that of `matrix` but for `scale_dtype`. Scales of mxfp4 must be powers
    of two from 2 ** -127 to 2 ** 127.
    """
    form = matrix.form
    assert replace(codes.form, scale_dtype=form.scale_dtype) == form, (codes.form, matrix)
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    if is_packed(matrix):
        if form.kind == "int4":
            numbers.copy_(pack(codes.codes))
        else:
            high, low = _planes(codes.codes)
            numbers[: matrix.shape[0]].copy_(pack(high))
            numbers[matrix.shape[0] :].copy_(pack(low))
        if codes.zeros is None:
            scales.copy_(codes.scales.t())
        else:
            scales[..., 0].copy_(codes.scales.t())
            scales[..., 1].copy_(codes.zeros.t())
        return
    if form.kind in ("int4", "mxfp4"):
        numbers.copy_(_paired(codes.codes))
    else:
        numbers.copy_(codes.codes)
    if form.kind == "mxfp4":
        fraction, exponent = torch.frexp(codes.scales)
        assert bool((fraction == 0.5).all()), "a scale of mxfp4 is no power of two"
        scales.copy_(exponent - 1 + _E8M0_BIAS)
    else:
        scales.copy_(codes.scales)
    if codes.zeros is not None:
        parts[f"{matrix.name}.zeros"].copy_(codes.zeros)


def held(matrix: Matrix, parts: Mapping[str, Tensor]) -> Codes:
    """Return the codes that `encode` wrote, scales and zeros rounded to the form's `scale_dtype`.

    Where that is not float32, dequantising gives another matrix than before by the bound that
    `form_for` states.
    """
    form, (rows, columns) = matrix.form, matrix.shape
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    zeros = None
    if is_packed(matrix):
        codes = unpack(numbers[:rows])
        if form.kind == "int8":
            codes = (codes << 4 | unpack(numbers[rows:])).view(torch.int8) - 128
        if form.zeros:
            scales, zeros = scales[..., 0], scales[..., 1].t().float()
        return Codes(form, codes, scales.t().float(), zeros)
    if form.kind in ("int4", "mxfp4"):
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=2).flatten(1)[:, :columns]
    if form.kind == "mxfp4":
        return Codes(form, numbers, torch.exp2(scales.float() - _E8M0_BIAS))
    if form.zeros:
        zeros = parts[f"{matrix.name}.zeros"].float()
    return Codes(form, numbers, scales.float(), zeros)


def _planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Split int8 codes so that code == 16 * (high - 8) + low, both 0 to 15."""
    shifted = codes.view(torch.uint8) ^ 128
    return shifted >> 4, shifted & 15


def _paired(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
