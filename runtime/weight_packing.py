"""How torch's four-bit CPU op wants its numbers: the permutation of this machine, and its inverse.

torch packs differently for AVX512, AVX2 and other CPUs: blocks of rows, column after column, where
a byte holds two rows of its block, either neighbours or one of each half. Rows that fill no block
are always packed as neighbours. Which it is, is learnt once from torch's own packing.

Doing it here takes a fiftieth of torch's time: files hold two numbers to a byte already, along a
row instead of along a column, and only bits change their places.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST_BLOCK = 64
"""No packing has blocks of more rows."""
_LINE_WORDS = 16
_NO_SIGNS, _SIGNS = np.uint64(0), np.uint64(0x8080808080808080)

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Packing:
    """`halves`: a byte of a full block of `rows` holds rows i and i + rows / 2, not 2i and 2i+1."""

    rows: int
    halves: bool


@functools.cache
def packing() -> Packing:
    """Return the packing of this machine's torch."""
    codes = torch.arange(LARGEST_BLOCK, dtype=torch.int32).unsqueeze(1).expand(-1, 32)
    low, high = (
        torch._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).flatten()
        for digit in (codes & 15, codes >> 4)
    )
    first = (low & 15).int() + 16 * (high & 15).int()
    second = (low >> 4).int() + 16 * (high >> 4).int()
    second_column = int((first == 0).nonzero()[1])
    found = Packing(2 * second_column, halves=int(second[0]) != 1)
    for digit, theirs in ((codes & 15, low), (codes >> 4, high)):
        assert torch.equal(unpack(theirs.view(len(codes), -1), found), digit), found
    return found


def pack_into(
    numbers: NDArray[Any],
    planes: Sequence[NDArray[np.uint8]],
    apart: int,
    signed: bool = False,
    packing_: Packing | None = None,
) -> None:
    """Pack rows of four-bit numbers, two to a byte of `numbers`; their number a multiple of 16.

    `numbers` is (N, bytes) or (N, runs, bytes), as it lies in a file: the last axis without gaps
    and a multiple of 16 bytes long, or int32 (N, words) with the first axis without gaps and
    `apart` 1. `planes` are flat. With `apart` 0 a byte is one column: its low half goes to the
    first of `planes`, and its high half to the second, or nowhere if there is only one. `signed`
    ones are int8, and what is packed is 128 more. Otherwise there is one plane, and a byte is two
    columns that lie `apart` bytes apart: 1, or a multiple of 16.
    """
    # Only those who pack wait for numba to be imported.
    from runtime import weight_packing_loops as loops

    by_columns = numbers.ndim == 2 and numbers.itemsize == numbers.strides[0] == 4
    if by_columns:
        assert apart == 1, apart
        words = numbers.T.view(np.uint32)
        for begin, end, block in _blocks(len(numbers), numbers.size * 4, planes, packing_):
            some = planes[0][begin * 4 * len(words) : end * 4 * len(words)]
            loops.pack_columns(words, begin, end, some, block.rows, block.halves)
        return
    if numbers.strides[-1] != numbers.itemsize:
        numbers = np.ascontiguousarray(numbers)
    data = numbers.view(np.uint8)
    if data.ndim == 2:
        data = data[:, None]
    columns = data[0].size * (2 if apart else 1)
    for begin, end, block in _blocks(len(data), data.size // (1 if apart else 2), planes, packing_):
        wide = [
            place[begin * columns // 2 : end * columns // 2].view(np.uint64) for place in planes
        ]
        if len(wide) == 1:
            wide.append(wide[0] if apart else wide[0][:0])
        flip = _SIGNS if signed else _NO_SIGNS
        some = data[begin:end]
        low, high = wide
        loops.pack_rows(some, flip, low, high, apart > 0, apart // 8, block.rows, block.halves)


def pack_eights(
    words: NDArray[np.int32], plane: NDArray[np.uint8], packing_: Packing | None = None
) -> None:
    """Pack words of eight rows each, (N / 8, K), as `Codes.eights` has them; N a multiple of 16."""
    # Only those who pack wait for numba to be imported.
    from runtime import weight_packing_loops as loops

    columns = words.shape[1]
    turned_words = words.T.view(np.uint32)
    for begin, end, block in _blocks(8 * len(words), words.size * 4, [plane], packing_):
        some = plane[begin * columns // 2 : end * columns // 2].view(np.uint64)
        loops.pack_eights(turned_words[:, begin // 8 : end // 8], some, block.rows, block.halves)


def _blocks(
    rows: int, plane_bytes: int, planes: Sequence[NDArray[np.uint8]], packing_: Packing | None
) -> Iterator[tuple[int, int, Packing]]:
    """Cut rows into those of full blocks and the rest: begin, end and packing of each."""
    if rows % 16 or plane_bytes * 2 % (rows * 32) or any(p.size != plane_bytes for p in planes):
        # The loops check nothing: this is what keeps them within their memory.
        sizes = [plane.size for plane in planes]
        raise ValueError(f"{rows} rows of {plane_bytes} bytes do not fit planes of {sizes} bytes")
    how = packing_ or packing()
    full = rows - rows % how.rows
    if full:
        yield 0, full, how
    if full < rows:
        yield full, rows, Packing(rows - full, halves=False)


def turned(words: Words) -> Words:
    """Return the transpose of (R, N) in memory of its own.

    Whole cache lines go first: numpy alone would fetch each of them once per word.
    """
    rows, columns = words.shape
    if columns % _LINE_WORDS or words.strides[1] != words.itemsize:
        return np.ascontiguousarray(words.T)
    lines = words.view(f"V{_LINE_WORDS * words.itemsize}").T.copy()
    squares = lines.view(np.uint32).reshape(-1, rows, _LINE_WORDS)
    return np.ascontiguousarray(squares.transpose(0, 2, 1)).reshape(columns, rows)


def unpack(packed: Tensor, packing_: Packing | None = None) -> Tensor:
    """Return the codes (N, K) of a plane (N, K / 2), on any device."""
    how = packing_ or packing()
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    full = rows - rows % how.rows
    nibbles = packed[:full].view(-1, columns, how.rows // 2)
    if how.halves:
        blocks = torch.cat((nibbles & 15, nibbles >> 4), dim=2)
    else:
        blocks = torch.stack((nibbles & 15, nibbles >> 4), dim=3).flatten(2)
    pieces = [blocks.transpose(1, 2).reshape(full, columns)]
    if full < rows:
        tail = packed[full:].reshape(columns, (rows - full) // 2).t()
        pieces.append(torch.stack((tail & 15, tail >> 4), dim=1).view(-1, columns))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
