"""The loops of `runtime.weight_packing`, compiled: packed numbers read once, written once in place.

All integers here are unsigned: an index that may be negative costs a comparison per number and
keeps the loop from being vectorised. Temporary arrays are flat for the same reason: known strides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from runtime.compiled import compiled

Words = NDArray[np.uint64]

_U = np.uint64
_LOW_NIBBLES, _HIGH_NIBBLES = _U(0x0F0F0F0F0F0F0F0F), _U(0xF0F0F0F0F0F0F0F0)
_LOW_BYTES, _LOW_PAIRS, _LOW_HALF = _U(0x00FF00FF00FF00FF), _U(0x0000FFFF0000FFFF), _U(0xFFFFFFFF)
_SIXTEEN = np.uint32(16)
_0, _1, _2, _4, _8, _16, _32, _64 = (_U(n) for n in (0, 1, 2, 4, 8, 16, 32, 64))


def _copy_sixteen_code(typing: Any, data: Any, at: Any, words: Any, to: Any) -> Any:
    """Copy sixteen bytes, from byte `at` of `data` on, to `words` from word `to` on.

    As one vector: a loop over them would check every time whether it overwrites what it reads.
    """

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        from_, into = (
            context.make_array(signature.args[n])(context, builder, values[n]).data for n in (0, 2)
        )
        two = ir.VectorType(ir.IntType(64), 2).as_pointer()
        found = builder.load(builder.bitcast(builder.gep(from_, [values[1]]), two), align=1)
        builder.store(found, builder.bitcast(builder.gep(into, [values[3]]), two), align=8)
        return context.get_dummy_value()

    return types.void(data, types.uint64, words, types.uint64), code


_copy_sixteen: Any = intrinsic(_copy_sixteen_code)


@compiled
def pack_rows(
    data: NDArray[np.uint8],
    flip: Any,
    low_plane: Words,
    high_plane: Words,
    two_codes: bool,
    apart_words: int,
    block_rows: int,
    halves: bool,
) -> None:
    """Pack whole blocks of rows of four-bit numbers, two to a byte.

    `data` is (N, runs, bytes), the last axis without gaps and an even number of words of eight
    bytes long. Each word is taken with `flip` exclusively or'd. With `two_codes` both planes are
    the same memory, and a byte of `apart_words` words is a column of its own for the low halves
    and, after those of all these words, for the high ones; 0 words stand for single bytes.
    Otherwise a byte is one column, its halves go to a plane each, and the high ones nowhere if
    theirs is empty.
    """
    has_high = high_plane.size > 0
    width, block = _U(data.shape[2]) // _8, _U(block_rows)
    row_bytes, run_bytes = _U(data.strides[0]), _U(data.strides[1])
    total = _U(data.shape[1]) * width
    run = max(_U(apart_words), _1)
    word_columns = _16 if two_codes else _8
    step = _2 if two_codes and apart_words == 0 else _1
    gap = _0
    if two_codes:
        gap = _8 * _U(apart_words) if apart_words > 0 else _1
    groups = block // _16
    # Where each two words of a row lie, and where the first column of each word goes.
    froms, firsts = np.empty(total // _2, np.uint64), np.empty(total, np.uint64)
    for word in range(total):
        froms[word // _2] = word // width * run_bytes + word % width // _2 * _16
        firsts[word] = (word // run * run * word_columns + word % run * _8) * groups
    pair, apart = (_1, block // _2) if halves else (_2, _1)
    square = np.empty(128, np.uint64)
    for number in range(_U(data.shape[0]) // block):
        before = number * total * word_columns * groups
        for group in range(groups):
            for begin in range(_0, total, _8):
                count = min(_8, total - begin)
                for k in range(_8):
                    one = (number * block + (group * _8 + k) * pair) * row_bytes
                    other = one + apart * row_bytes
                    for two in range(count // _2):
                        at, to = froms[begin // _2 + two], k * _8 + two * _2
                        _copy_sixteen(data, one + at, square, to)
                        _copy_sixteen(data, other + at, square, _64 + to)
                for k in range(_64):
                    a, b = square[k] ^ flip, square[_64 + k] ^ flip
                    square[k] = (a & _LOW_NIBBLES) | ((b & _LOW_NIBBLES) << _4)
                    square[_64 + k] = ((a >> _4) & _LOW_NIBBLES) | (b & _HIGH_NIBBLES)
                _turn_bytes(square, _0)
                for word in range(count):
                    to = before + firsts[begin + word] + group
                    for k in range(_8):
                        low_plane[to + step * groups * k] = square[k * _8 + word]
                if has_high:
                    _turn_bytes(square, _64)
                    for word in range(count):
                        to = before + firsts[begin + word] + gap * groups + group
                        for k in range(_8):
                            high_plane[to + step * groups * k] = square[_64 + k * _8 + word]


@compiled
def _turn_bytes(words: Words, begin: Any) -> None:
    """Transpose the eight by eight bytes of every column of (8, 8) words from `begin` on."""
    for w in range(begin, begin + _8):
        a, b, c, d = words[w], words[_8 + w], words[_16 + w], words[_U(24) + w]
        e, f, g, h = words[_32 + w], words[_U(40) + w], words[_U(48) + w], words[_U(56) + w]
        a, e = _exchanged(a, e, _32, _LOW_HALF)
        b, f = _exchanged(b, f, _32, _LOW_HALF)
        c, g = _exchanged(c, g, _32, _LOW_HALF)
        d, h = _exchanged(d, h, _32, _LOW_HALF)
        a, c = _exchanged(a, c, _16, _LOW_PAIRS)
        b, d = _exchanged(b, d, _16, _LOW_PAIRS)
        e, g = _exchanged(e, g, _16, _LOW_PAIRS)
        f, h = _exchanged(f, h, _16, _LOW_PAIRS)
        a, b = _exchanged(a, b, _8, _LOW_BYTES)
        c, d = _exchanged(c, d, _8, _LOW_BYTES)
        e, f = _exchanged(e, f, _8, _LOW_BYTES)
        g, h = _exchanged(g, h, _8, _LOW_BYTES)
        words[w], words[_8 + w], words[_16 + w], words[_U(24) + w] = a, b, c, d
        words[_32 + w], words[_U(40) + w], words[_U(48) + w], words[_U(56) + w] = e, f, g, h


@compiled
def _exchanged(first: Any, second: Any, bits: Any, lower: Any) -> tuple[Any, Any]:
    """Exchange the upper ones of `first`'s pairs of fields with the lower ones of `second`'s."""
    moved = ((first >> bits) ^ second) & lower
    return first ^ (moved << bits), second ^ moved


@compiled
def pack_columns(
    words: NDArray[np.uint32],
    begin: int,
    end: int,
    plane: NDArray[np.uint8],
    block_rows: int,
    halves: bool,
) -> None:
    """Pack whole blocks of rows, from row `begin` up to row `end`.

    `words` (K / 8, N): eight columns of a row each, the first in the lowest bits.
    """
    eights, half = _U(words.shape[0]), _U(block_rows) // _2
    four, fifteen = np.uint32(4), np.uint32(15)
    for number in range(_U(end - begin) // _U(block_rows)):
        row = _U(begin) + number * _U(block_rows)
        for eight in range(eights):
            first = (number * eights + eight) * _8 * half
            for column in range(_8):
                shift, to = np.uint32(column) * four, first + column * half
                if halves:
                    for k in range(half):
                        a = (words[eight, row + k] >> shift) & fifteen
                        b = (words[eight, row + half + k] >> shift) & fifteen
                        plane[to + k] = a | (b << four)
                else:
                    for k in range(half):
                        a = (words[eight, row + _2 * k] >> shift) & fifteen
                        b = (words[eight, row + _2 * k + _1] >> shift) & fifteen
                        plane[to + k] = a | (b << four)


@compiled
def pack_eights(words: NDArray[np.uint32], plane: Words, block_rows: int, halves: bool) -> None:
    """Pack whole blocks of rows from words of eight rows each, (K, N / 8), even rows lower."""
    columns, width, block = _U(words.shape[0]), _U(words.shape[1]), _U(block_rows) // _8
    half = block // _2
    rows = np.empty(16, np.uint64)
    for start in range(_0, width, _16):
        # Words of one cache line, over and over: what is written goes on where it ended.
        count = min(_16, width - start)
        for column in range(columns):
            for k in range(count):
                rows[k] = _eight_bytes(words[column, start + k])
            to = start // block * columns * half + column * half
            for first in range(_0, count, block):
                if halves:
                    for k in range(half):
                        plane[to + k] = rows[first + k] | (rows[first + half + k] << _4)
                else:
                    for k in range(half):
                        low, high = rows[first + _2 * k], rows[first + _2 * k + _1]
                        plane[to + k] = _pairs(low) | (_pairs(high) << _32)
                to += columns * half


@compiled
def _eight_bytes(word: Any) -> Any:
    """Return eight numbers of four bits as bytes: of the lower half and of the upper in turns."""
    wide = _U(word)
    wide = (wide & _U(0xFFFF)) | ((wide >> _16) << _32)
    wide = (wide | (wide << _8)) & _LOW_BYTES
    wide = (wide | (wide << _4)) & _LOW_NIBBLES
    # Both halves are four bytes now; each byte of the upper one belongs after one of the lower.
    low, high = wide & _LOW_HALF, wide >> _32
    low = (low | (low << _16)) & _LOW_PAIRS
    high = (high | (high << _16)) & _LOW_PAIRS
    return ((low | (low << _8)) & _LOW_BYTES) | (((high | (high << _8)) & _LOW_BYTES) << _8)


@compiled
def _pairs(bytes_: Any) -> Any:
    """Return eight numbers of a byte each as four bytes of two, the first one low."""
    wide = (bytes_ | (bytes_ >> _4)) & _LOW_BYTES
    wide = (wide | (wide >> _8)) & _LOW_PAIRS
    return (wide | (wide >> _16)) & _LOW_HALF


@compiled
def write_groups(
    scales: NDArray[np.uint32],
    zeros: NDArray[np.uint32],
    has_zeros: bool,
    as_bfloat16: bool,
    first: int,
    places: NDArray[Any],
) -> None:
    """Write the bits of float32 scales (N, K / group) into `places`, from row `first` of it on.

    Those are (K / group, rows), unsigned numbers of the width of a float32 or a bfloat16, to which
    they are rounded: to the nearest, of two to the even one. With `has_zeros` they are twice as
    wide, and the upper half is the zero.
    """
    rows, groups = _U(scales.shape[0]), _U(scales.shape[1])
    width = _16 if as_bfloat16 else _32
    some = np.empty(_64 * groups, places.dtype)
    if scales.strides[0] < scales.strides[1]:
        for group in range(groups):
            for row in range(rows):
                bits = _held_bits(scales[row, group], as_bfloat16)
                if has_zeros:
                    bits |= _held_bits(zeros[row, group], as_bfloat16) << width
                places[group, _U(first) + row] = bits
        return
    for begin in range(_0, rows, _64):
        # Row by row and then group by group: each loop has one side in order.
        count = min(_64, rows - begin)
        for row in range(count):
            for group in range(groups):
                bits = _held_bits(scales[begin + row, group], as_bfloat16)
                if has_zeros:
                    bits |= _held_bits(zeros[begin + row, group], as_bfloat16) << width
                some[row * groups + group] = bits
        for group in range(groups):
            for row in range(count):
                places[group, _U(first) + begin + row] = some[row * groups + group]


@compiled
def _held_bits(bits: Any, as_bfloat16: bool) -> Any:
    """Return the bits of a float32 as they are, or those of the bfloat16 next to it."""
    up = np.uint32(0x7FFF) + ((bits >> _SIXTEEN) & np.uint32(1))
    rounded = np.uint32(bits + up) >> _SIXTEEN
    is_number = (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
    short = rounded if is_number else np.uint32(0x7FC0)
    return _U(short if as_bfloat16 else bits)
