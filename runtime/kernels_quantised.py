"""Multiplying by matrices that are held quantised, the fastest way this machine has per batch.

bfloat16 on a CPU has fast ways of its own: torch's packed ops and our fused ones for a few tokens,
and for many a dequantisation made of a handful of vectorised passes before an ordinary product.
They round differently, so the way depends on nothing but the matrix, the dtype and the number of
tokens: where and when an expert is computed on a device never changes its rows. Everything else
dequantises to the activations' dtype and multiplies as if the matrix were plain. torch's packed
ops are scalar loops for other dtypes than bfloat16 (thirty times slower than dequantising), and
its eight-bit op reads beyond its memory where the inputs are no multiple of 16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.formats import Matrix
from runtime.kernels_fused import has_fused_product, multiply_fused
from runtime.weight_forms import MXFP4_VALUES, dequantise, held, is_packed
from runtime.weight_packing import packing

FEW_TOKENS = 8
"""Up to how many tokens packed ops are taken where nothing was measured."""
_INT8_COLUMNS = 16
_ROWS_AT_ONCE = 1024


def has_packed_op(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Say whether a CPU can multiply by `matrix` as it is held, for a few tokens of `dtype`."""
    if dtype != torch.bfloat16:
        return False
    form = matrix.form
    by_rows = form.kind == "int8" and form.rows == 1 and not form.columns and not form.zeros
    eight_bit = by_rows and matrix.shape[1] % _INT8_COLUMNS == 0
    return is_packed(matrix) or eight_bit or has_fused_product(matrix)


def multiply(
    matrix: Matrix, parts: Mapping[str, Tensor], x: Tensor, few_tokens: int | None = FEW_TOKENS
) -> Tensor:
    """Return `x` (t, inputs) times the transposed matrix: (t, outputs) in the dtype of `x`.

    `few_tokens` None: as if the matrix were plain, whatever it costs.
    """
    if few_tokens is None or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return linear(x, dequantise(held(matrix, parts), x.dtype))
    if x.shape[0] <= few_tokens and has_packed_op(matrix, x.dtype):
        return _packed(matrix, parts, x)
    return _unpacked(matrix, parts, x)


def _packed(matrix: Matrix, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if matrix.form.kind in ("fp8", "mxfp4"):
        return multiply_fused(matrix, parts, x)
    numbers, rows, group = parts[matrix.name], matrix.shape[0], matrix.form.columns
    if not is_packed(matrix):
        scales = parts[f"{matrix.name}.scales"].to(x.dtype).view(-1)
        return torch._weight_int8pack_mm(x, numbers, scales)
    if matrix.form.kind == "int4" and matrix.form.zeros:
        return _int4(x, numbers, group, parts[f"{matrix.name}.scales"].to(x.dtype))
    scale, zero = _scales(matrix, parts)
    if matrix.form.kind == "int4":
        return _int4(x, numbers, group, _side_by_side(scale, None))
    # 16 * (high - 8) + low - 128 with both centred: 16 * (high - 8) + 8 + (low - 8).
    middle = scale * 8 if zero is None else zero + scale * 8
    high = _int4(x, numbers[:rows], group, _side_by_side(scale * 16, middle))
    return high.add_(_int4(x, numbers[rows:], group, _side_by_side(scale, None)))


def _int4(x: Tensor, numbers: Tensor, group: int, pairs: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, numbers, group, pairs)
    return product


# Strided operands take scalar loops, ten times slower than these detours over wider integers.


def _scales(matrix: Matrix, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return scales and zeros of a packed matrix, (K / group, N) each, in bfloat16."""
    scales = parts[f"{matrix.name}.scales"].to(torch.bfloat16)
    if not matrix.form.zeros:
        return scales, None
    pairs = scales.view(torch.int32).squeeze(2)
    scale, zero = (pairs << 16).view(torch.float32), (pairs & -0x10000).view(torch.float32)
    return scale.to(torch.bfloat16), zero.to(torch.bfloat16)


def _side_by_side(scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return (K / group, N, 2), as the four-bit op wants them; no zeros: zeros of 0."""
    pairs = scale.view(torch.int16).to(torch.int32) & 0xFFFF
    if zero is not None:
        pairs |= zero.view(torch.int16).to(torch.int32) << 16
    return pairs.unsqueeze(2).view(torch.bfloat16)


def _unpacked(matrix: Matrix, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    (rows, columns), form = matrix.shape, matrix.form
    if is_packed(matrix):
        if rows % packing().rows:
            return linear(x, dequantise(held(matrix, parts), x.dtype))
        return _by_column(matrix, parts, x)
    if form.kind == "int8" and form.rows == 1 and not form.columns and not form.zeros:
        scales = parts[f"{matrix.name}.scales"].to(x.dtype).view(-1)
        return linear(x, parts[matrix.name].to(x.dtype)) * scales
    if form.kind == "fp8":
        return _some_rows_at_a_time(matrix, parts, x, _float8)
    if form.kind == "mxfp4" and form.columns and columns % form.columns == 0 == columns % 4:
        return _some_rows_at_a_time(matrix, parts, x, _mxfp4)
    return linear(x, dequantise(held(matrix, parts), x.dtype))


def _some_rows_at_a_time(
    matrix: Matrix,
    parts: Mapping[str, Tensor],
    x: Tensor,
    dequantised: Callable[[Matrix, Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """Multiply by blocks of about `_ROWS_AT_ONCE` rows, whose numbers stay in the caches.

    Memory for a large matrix would also be mapped anew each time, which takes longer than the rest.
    """
    (rows, columns), block_rows = matrix.shape, matrix.form.rows
    step = max(_ROWS_AT_ONCE // block_rows, 1) * block_rows
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        some = {
            matrix.name: numbers[first:last],
            f"{matrix.name}.scales": scales[first // block_rows : -(-last // block_rows)],
        }
        weight = dequantised(replace(matrix, shape=(last - first, columns)), some)
        out[:, first:last] = linear(x, weight)
    return out


def _by_column(matrix: Matrix, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Multiply by the transposed matrix, the order in which a packed one is unpacked for free."""
    (rows, columns), group = matrix.shape, matrix.form.columns
    block = packing().rows
    packed = parts[matrix.name].view(-1, rows // block, columns, block // 2)
    if matrix.form.kind == "int4":
        first, second = (packed[0] & 15) - 8, (packed[0] >> 4) - 8
    else:
        high, low = packed.unbind()
        first, second = (high << 4 | low & 15) ^ 128, (high & 240 | low >> 4) ^ 128
    numbers = torch.empty((columns, rows), dtype=torch.uint8)
    if packing().halves:
        first_places, second_places = numbers.view(columns, rows // block, 2, -1).unbind(2)
    else:
        first_places, second_places = numbers.view(columns, rows // block, -1, 2).unbind(3)
    first_places.movedim(1, 0).copy_(first)
    second_places.movedim(1, 0).copy_(second)
    values = numbers.view(torch.int8).to(x.dtype).view(-1, group, rows)
    scale, zero = _scales(matrix, parts)
    if zero is None:
        weight = values.mul_(scale.unsqueeze(1))
    else:
        weight = torch.addcmul(zero.unsqueeze(1), values, scale.unsqueeze(1))
    return x @ weight.view(columns, rows)


_E4M3_AS_BFLOAT16 = 2.0**120
_E4M3_BITS = (
    -0x7810
)  # the sign, four bits of exponent and three of mantissa, where bfloat16 has them


def _float8(matrix: Matrix, parts: Mapping[str, Tensor]) -> Tensor:
    """Dequantise to bfloat16 by shifting bits into place, fifty times faster than torch's cast.

    The bits stand for 2 ** -120 of the number; the scale makes that good. NaN becomes 480.
    """
    (rows, columns), form = matrix.shape, matrix.form
    wide = parts[matrix.name].view(torch.int8).to(torch.int16)
    values = wide.bitwise_left_shift_(4).bitwise_and_(_E4M3_BITS).view(torch.bfloat16)
    scales = (parts[f"{matrix.name}.scales"].float() * _E4M3_AS_BFLOAT16).to(torch.bfloat16)
    width = form.columns or columns
    if rows % form.rows == 0 and columns % width == 0:
        blocks = values.view(scales.shape[0], form.rows, scales.shape[1], width)
        return blocks.mul_(scales[:, None, :, None]).view(rows, columns)
    wide_scales = scales.repeat_interleave(form.rows, 0)[:rows]
    return values.mul_(wide_scales.repeat_interleave(width, 1)[:, :columns])


_NOTHING = 2.0**-63
_LEAST_EXPONENT = 127 - 60


@functools.cache
def _four_numbers() -> Tensor:
    """Return, by uint16, the four mxfp4 numbers of two bytes as one int64; 2 ** -63 stands for 0.

    So that exponents can be added to all of them alike.
    """
    values = torch.tensor([value or _NOTHING for value in MXFP4_VALUES], dtype=torch.bfloat16)
    bits = torch.arange(2**16)
    return torch.stack([values[bits >> shift & 15] for shift in (0, 4, 8, 12)], 1).view(torch.int64)


def _mxfp4(matrix: Matrix, parts: Mapping[str, Tensor]) -> Tensor:
    """Dequantise to bfloat16: one look-up for four numbers, scales added to their exponents.

    Exact but for zeros, which become 2 ** -63 of their scale, and scales below 2 ** -60, which
    become that: both far below what a sum in float32 can see.
    """
    rows, columns = matrix.shape
    four = parts[matrix.name].view(torch.uint16).view(-1).to(torch.int32)
    values = _four_numbers().view(-1).index_select(0, four).view(torch.int16)
    exponents = parts[f"{matrix.name}.scales"].clamp(min=_LEAST_EXPONENT).to(torch.int16)
    shifts = (exponents - 127 << 7).unsqueeze(2)
    values.view(rows, shifts.shape[1], -1).add_(shifts)
    return values.view(torch.bfloat16).view(rows, columns)
