"""The loops of `runtime.quantize`, compiled: a group of numbers is read once and written once.

Arithmetic is that of float32 operations one after another, never fused or reordered, so that the
same matrix becomes the same bytes on every machine: sums go over eight lanes, four rows of lanes
at once, as torch's do. Indices are unsigned: one that may be negative costs a comparison per number
and keeps a loop from being vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from runtime.compiled import compiled

Floats = NDArray[np.float32]

_U, _F = np.uint64, np.float32
_VARIABLE: Any = cgutils.alloca_once_value
_TUPLE: Any = types.UniTuple
_SUMS = _TUPLE(types.float32, 2)
_32 = _U(32)
_LEAST_SCALE = _F(1e-30)
_NONE, _TWO = _F(0), _F(2)


def _two_sums(terms: Callable[[Any, Any, Any, Any], tuple[Any, Any]]) -> Any:
    """Return a function of numbers, values, where a group begins, how many 32s it has, a middle.

    It returns the sums of both of `terms`, which are told how to write code, eight numbers, eight
    values and the middle. They go by lanes, four rows of eight at once, then these rows, then lanes
    from the first to the last: an order that a compiler does not choose by itself.
    """
    eight = ir.VectorType(ir.FloatType(), 8)
    nothing = ir.Constant(eight, None)
    lanes = [ir.Constant(ir.IntType(32), lane) for lane in range(8)]

    def typed(typing: Any, numbers: Any, values: Any, begin: Any, parts: Any, middle: Any) -> Any:
        return _SUMS(numbers, values, types.uint64, types.uint64, types.float32), code

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = zip(signature.args[:2], arguments[:2], strict=True)
        data = [context.make_array(kind)(context, builder, array).data for kind, array in arrays]
        firsts = [builder.gep(begin, [arguments[2]]) for begin in data]
        middle = nothing
        for lane in lanes:
            middle = builder.insert_element(middle, arguments[4], lane)
        sums = [[_VARIABLE(builder, nothing) for _ in range(2)] for _ in range(4)]
        with cgutils.for_range(builder, arguments[3]) as loop:
            word = loop.index.type
            part = builder.mul(loop.index, ir.Constant(word, 32))
            for number, both in enumerate(sums):
                at = builder.add(part, ir.Constant(word, 8 * number))
                places = [builder.gep(first, [at]) for first in firsts]
                wide = [builder.bitcast(place, eight.as_pointer()) for place in places]
                ours, theirs = (builder.load(place, align=4) for place in wide)
                for term, sum_ in zip(terms(builder, ours, theirs, middle), both, strict=True):
                    builder.store(builder.fadd(builder.load(sum_), term), sum_)
        totals = []
        for rows in zip(*sums, strict=True):
            row = builder.load(rows[0])
            for other in rows[1:]:
                row = builder.fadd(row, builder.load(other))
            total = ir.Constant(ir.FloatType(), 0.0)
            for lane in lanes:
                total = builder.fadd(total, builder.extract_element(row, lane))
            totals.append(total)
        return context.make_tuple(builder, signature.return_type, totals)

    return intrinsic(typed)


def _squares(builder: Any, numbers: Any, values: Any, middle: Any) -> tuple[Any, Any]:
    apart = builder.fsub(numbers, middle)
    return builder.fmul(apart, apart), builder.fmul(apart, values)


_sums = _two_sums(lambda builder, numbers, values, middle: (numbers, values))
_sums_of_squares = _two_sums(_squares)


@compiled
def symmetric(
    matrix: Floats,
    bits: NDArray[np.uint32],
    width: int,
    least: Any,
    most: Any,
    more: Any,
    as_bfloat16: bool,
    codes: NDArray[np.int8],
    scales: Floats,
) -> None:
    """Quantise groups of `width` to a scale each, from `least` to `most`; codes are `more`.

    `bits` is the memory of `matrix`. A group with a number that is not finite gets such a scale.
    """
    size = _U(width)
    for row in range(_U(matrix.shape[0])):
        for group in range(_U(scales.shape[1])):
            begin = group * size
            # Without its sign, of two floats the larger one has the larger bits.
            largest = np.uint32(0)
            for k in range(size):
                largest = max(largest, np.uint32(bits[row, begin + k] & np.uint32(0x7FFFFFFF)))
            scale = _held(np.uint32(largest).view(np.float32) / most, as_bfloat16)
            scales[row, group] = scale
            for k in range(size):
                number = np.rint(matrix[row, begin + k] / scale)
                codes[row, begin + k] = np.int8(min(max(number, least), most) + more)


@compiled
def fitted(
    matrix: Floats,
    bits: NDArray[np.int32],
    width: int,
    least: Any,
    most: Any,
    more: Any,
    as_bfloat16: bool,
    codes: NDArray[np.int8],
    scales: Floats,
    zeros: Floats,
) -> None:
    """Quantise groups of `width`, a multiple of 32, to a scale and a zero each.

    Those of the range first, then those with the least squared error for the numbers that came out.
    Otherwise as `symmetric`.
    """
    size, count, groups = _U(width), _F(width), _U(scales.shape[1])
    numbers = np.empty(matrix.shape[1], np.float32)
    middles, means = np.empty(groups, np.float32), np.empty(groups, np.float32)
    parts = size // _32
    for row in range(_U(matrix.shape[0])):
        values = matrix[row]
        # Step by step for the whole row: each has long chains, and those of groups overlap.
        for group in range(groups):
            low, high = _range(bits, row, group * size, size)
            scale = _held((high - low) / (most - least), as_bfloat16)
            zero = _rounded((low + high - scale * (least + most)) / _TWO, as_bfloat16)
            scales[row, group], zeros[row, group] = scale, zero
        for group in range(groups):
            scale, zero, begin = scales[row, group], zeros[row, group], group * size
            for k in range(size):
                number = np.rint((matrix[row, begin + k] - zero) / scale)
                numbers[begin + k] = min(max(number, least), most)
        for group in range(groups):
            sums = _sums(numbers, values, group * size, parts, _NONE)
            middles[group], means[group] = sums[0] / count, sums[1] / count
        for group in range(groups):
            sums = _sums_of_squares(numbers, values, group * size, parts, middles[group])
            better = _rounded(sums[1] / max(sums[0], _LEAST_SCALE), as_bfloat16)
            zeros[row, group] = _rounded(means[group] - better * middles[group], as_bfloat16)
            if better > _NONE:
                scales[row, group] = better
        for group in range(groups):
            scale, zero, begin = scales[row, group], zeros[row, group], group * size
            for k in range(size):
                number = np.rint((matrix[row, begin + k] - zero) / scale)
                codes[row, begin + k] = np.int8(min(max(number, least), most) + more)


@compiled
def _range(bits: NDArray[np.int32], row: Any, begin: Any, size: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest number of a group."""
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for k in range(size):
        # Bits of negative floats grow as these fall: turned round, all are in order as integers.
        found = bits[row, begin + k]
        ordered = np.int32(found ^ ((found >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low, high = min(low, ordered), max(high, ordered)
    low = np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    high = np.int32(high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return low.view(np.float32), high.view(np.float32)


@compiled
def _held(scale: Any, as_bfloat16: bool) -> Any:
    """Return a scale as it is held, never too small to divide by."""
    return _rounded(_LEAST_SCALE if scale < _LEAST_SCALE else scale, as_bfloat16)


@compiled
def _rounded(value: Any, as_bfloat16: bool) -> Any:
    """Return a float32 as bfloat16 has it: to the nearest, of two to the even one."""
    if not as_bfloat16 or value != value:
        return value
    bits = np.float32(value).view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
