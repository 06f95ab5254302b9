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
_0, _1, _2, _4, _8, _16, _32, _64 = (_U(n) for n in (0, 1, 2, 4, 8, 16, 32, 64))


def _copy_sixteen_code(typing: Any, data: Any, at: Any, words: Any, to: Any) -> Any:
    """Copy sixteen bytes from byte `at` on, wherever they lie, to `words` from word `to` on.

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
    rows: int,
    row_bytes: int,
    runs: tuple[int, int, int],
    flip: Any,
    planes: tuple[Words, Words],
    two_codes: bool,
    apart_words: int,
    block_rows: int,
    halves: bool,
) -> None:
    """Pack whole blocks of rows of four-bit numbers, two to a byte.

    Rows begin `row_bytes` apart, and have so many runs, that lie so many bytes apart, of so many
    words of eight bytes: `runs`, their number even. Each word is taken with `flip` exclusively
    or'd. With `two_codes` both planes are the same memory, and a byte of `apart_words` words is a
    column of its own for the low halves and, after those of all these words, for the high ones; 0
    words stand for single bytes. Otherwise a byte is one column, its halves go to a plane each, and
    the high ones nowhere if theirs is empty.
    """
    low_plane, high_plane = planes
    has_high = high_plane.size > 0
    width, block = _U(runs[2]), _U(block_rows)
    total = _U(runs[0]) * width
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
        froms[word // _2] = word // width * _U(runs[1]) + word % width // _2 * _16
        firsts[word] = (word // run * run * word_columns + word % run * _8) * groups
    pair, apart = (_1, block // _2) if halves else (_2, _1)
    square = np.empty(128, np.uint64)
    for number in range(_U(rows) // block):
        before = number * total * word_columns * groups
        for group in range(groups):
            for begin in range(_0, total, _8):
                count = min(_8, total - begin)
                for k in range(_8):
                    one = (number * block + (group * _8 + k) * pair) * _U(row_bytes)
                    other = one + apart * _U(row_bytes)
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
def turn_scales(scales: NDArray[Any], first: int, groups: NDArray[Any]) -> None:
    """Write scales (N, K / group) into `groups` (K / group, rows), from row `first` of it on."""
    rows = _U(scales.shape[0])
    for begin in range(_0, rows, _64):
        for group in range(_U(scales.shape[1])):
            for row in range(begin, min(begin + _64, rows)):
                groups[group, _U(first) + row] = scales[row, group]


@compiled
def turn_groups(
    scales: NDArray[Any], zeros: NDArray[Any], first: int, groups: NDArray[Any]
) -> None:
    """Write scales and zeros beside them, (N, K / group), into `groups` (K / group, rows, 2)."""
    rows = _U(scales.shape[0])
    for begin in range(_0, rows, _64):
        for group in range(_U(scales.shape[1])):
            for row in range(begin, min(begin + _64, rows)):
                groups[group, _U(first) + row, _0] = scales[row, group]
                groups[group, _U(first) + row, _1] = zeros[row, group]
