"""How torch's four-bit CPU op wants its numbers: the permutation of this machine, and its inverse.

torch packs differently for AVX512, AVX2 and other CPUs: blocks of rows, column after column, where
a byte holds two rows of its block, either neighbours or one of each half. Rows that fill no block
are always packed as neighbours. Which it is, is learnt once from torch's own packing.

Doing it here takes a tenth of torch's time: files hold two numbers to a byte already, along a row
instead of along a column. So fields are exchanged between whole rows, four bits and then bytes at
a time, which leaves a transposition of four-byte words.
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
_LOWER_FIELDS = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}
_LINE_WORDS = 16

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
        assert torch.equal(pack(digit, found).flatten(), theirs), found
    return found


def pack(codes: Tensor, packing_: Packing | None = None) -> Tensor:
    """Return uint8 (N, K / 2) for codes of 0 to 15, (N, K); N a multiple of 16, K of 4."""
    packed = torch.empty((len(codes), codes.shape[1] // 2), dtype=torch.uint8)
    pack_into(codes.to(torch.uint8).numpy(), [packed], 0, packing_)
    return packed


def pack_into(
    numbers: NDArray[np.uint8],
    planes: Sequence[Tensor],
    apart: int,
    packing_: Packing | None = None,
) -> None:
    """Pack rows of four-bit numbers, two to a byte of `numbers` (N, bytes); N a multiple of 16.

    `planes` are contiguous uint8. With `apart` 0 a byte is one column: its low half goes to the
    first of `planes`, (N, bytes / 2), and its high half to the second; where there is only one,
    high halves are 0. Otherwise there is one, (N, bytes), and a byte is two columns that lie
    `apart` bytes apart: 1, or a multiple of 4.
    """
    how = packing_ or packing()
    full = len(numbers) - len(numbers) % how.rows
    if full:
        tops = [plane[:full] for plane in planes]
        _pack_blocks(numbers[:full], tops, apart, how)
    if full < len(numbers):
        tails = [plane[full:] for plane in planes]
        _pack_blocks(numbers[full:], tails, apart, Packing(len(numbers) - full, halves=False))


def exchange(first: NDArray[Any], second: NDArray[Any], bits: int) -> None:
    """Exchange the upper ones of `first`'s pairs of fields with the lower ones of `second`'s."""
    moved = first >> np.uint32(bits)
    moved ^= second
    moved &= np.uint32(_LOWER_FIELDS[bits])
    second ^= moved
    moved <<= np.uint32(bits)
    first ^= moved


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


def _pack_blocks(
    numbers: NDArray[np.uint8], planes: Sequence[Tensor], apart: int, how: Packing
) -> None:
    words = np.ascontiguousarray(numbers).view(np.uint32)
    blocks, fours = len(words) // how.rows, how.rows // 8
    # Axes: which row of a byte, which of four neighbouring bytes, and whatever is moved together.
    if how.halves:
        rows = words.reshape(blocks, 2, fours, 4, -1).transpose(1, 3, 0, 2, 4)
    else:
        rows = words.reshape(blocks, fours, 4, 2, -1).transpose(3, 2, 0, 1, 4)
    pairs = rows.copy(order="C")
    if apart == 0 and len(planes) == 1:
        pairs[0] |= pairs[1] << np.uint32(4)
    else:
        exchange(pairs[0], pairs[1], 4)
    for square, place in zip(pairs, _places(planes, apart, blocks, fours), strict=False):
        exchange(square[:2], square[2:], 16)
        exchange(square[0::2], square[1::2], 8)
        shape = (4, blocks, fours, place.shape[1], place.shape[2])
        np.copyto(place, square.reshape(shape).transpose(1, 3, 4, 0, 2))


def _places(planes: Sequence[Tensor], apart: int, blocks: int, fours: int) -> Iterator[Words]:
    """Return where low and high halves go: (blocks, runs, words, columns of a word, fours)."""
    for plane in planes:
        flat: Words = plane.numpy().reshape(-1).view(np.uint32)
        if apart == 0:
            yield flat.reshape(blocks, 1, -1, 4, fours)
        elif apart == 1:
            both = flat.reshape(blocks, 1, -1, 4, 2, fours)
            yield from (both[..., 0, :], both[..., 1, :])
        else:
            both = flat.reshape(blocks, -1, 2, apart // 4, 4, fours)
            yield from (both[:, :, 0], both[:, :, 1])


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`, on any device."""
    how = packing()
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
