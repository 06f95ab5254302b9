"""How torch's four-bit CPU op wants its numbers: the permutation of this machine, and its inverse.

torch packs differently for AVX512, AVX2 and other CPUs: blocks of rows, column after column, where
a byte holds two rows of its block, either neighbours or one of each half. Rows that fill no block
are always packed as neighbours. Which it is, is learnt once from torch's own packing.

Doing it here takes a fiftieth of torch's time: files hold two numbers to a byte already, along a
row instead of along a column, and only bits change their places.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    numbers: Tensor,
    planes: Sequence[Tensor],
    apart: int,
    signed: bool = False,
    packing_: Packing | None = None,
) -> None:
    """Pack rows of four-bit numbers, two to a byte of `numbers`; their number a multiple of 16.

    `numbers` is (N, bytes) or (N, runs, bytes), as it lies in a file: the last axis without gaps
    and a multiple of 16 bytes long, or int32 (N, words) with the first axis without gaps and
    `apart` 1. `planes` are contiguous uint8. With `apart` 0 a byte is one column: its low half goes
    to the first of `planes`, (N, bytes / 2), and its high half to the second, or nowhere if there
    is only one. `signed` ones are int8, and what is packed is 128 more. Otherwise there is one
    plane, and a byte is two columns that lie `apart` bytes apart: 1, or a multiple of 16.
    """
    # Only those who pack wait for numba to be imported.
    from runtime import weight_packing_loops as loops

    how = packing_ or packing()
    rows, size, stride = numbers.shape[0], numbers.itemsize, numbers.stride()
    columns = numbers[0].nbytes * (2 if apart else 1)
    if rows % 16 or columns % 32 or any(2 * plane.nbytes != rows * columns for plane in planes):
        # The loops check nothing: this is what keeps them within their memory.
        sizes = [plane.nbytes for plane in planes]
        raise ValueError(f"{rows} rows of {columns} numbers do not fit planes of {sizes} bytes")
    by_columns = size == 4 and stride == (1, rows)
    if not by_columns and stride[-1] != 1:
        numbers = numbers.contiguous()
        stride = numbers.stride()
    runs = numbers.shape[1] if len(stride) == 3 else 1
    data, row_bytes = _memory(numbers), stride[0] * size
    places: list[NDArray[Any]] = [plane.view(-1).numpy() for plane in planes]
    plane_bytes = places[0].size // rows
    full = rows - rows % how.rows
    for begin, end, block in ((0, full, how), (full, rows, Packing(rows - full, halves=False))):
        if begin == end:
            continue
        some = [place[begin * plane_bytes : end * plane_bytes] for place in places]
        if by_columns:
            assert apart == 1, apart
            words = data.view(np.uint32).reshape(-1, rows)
            loops.pack_columns(words, begin, end, some[0], block.rows, block.halves)
            continue
        wide = [place.view(np.uint64) for place in some]
        loops.pack_rows(
            data[begin * row_bytes :],
            end - begin,
            row_bytes,
            (runs, stride[-2] * size, numbers.shape[-1] * size // 8),
            _SIGNS if signed else _NO_SIGNS,
            (wide[0], wide[0][:0] if apart == 0 and len(wide) == 1 else wide[-1]),
            apart > 0,
            apart // 8,
            block.rows,
            block.halves,
        )


def _memory(numbers: Tensor) -> NDArray[np.uint8]:
    """Return the bytes from the first to the last one of a tensor, gaps and all."""
    if numbers.is_contiguous():
        whole: NDArray[Any] = numbers.view(-1).numpy()
        return whole.view(np.uint8)
    pairs = zip(numbers.shape, numbers.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in pairs)
    flat: NDArray[Any] = numbers.as_strided((extent,), (1,)).numpy()
    return flat.view(np.uint8)


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
