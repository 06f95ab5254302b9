"""How torch's four-bit CPU op wants its numbers: the permutation of this machine, and its inverse.

torch packs differently for AVX512, AVX2 and other CPUs: blocks of rows, column after column, where
a byte holds two rows of its block, either neighbours or one of each half. Rows that fill no block
are always packed as neighbours. Which it is, is learnt once from torch's own packing; doing it
here by shifts is five times faster than there, where every number takes four bytes first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_BLOCK = 64


@dataclass(frozen=True)
class Packing:
    """`halves`: a byte of a full block of `rows` holds rows i and i + rows / 2, not 2i and 2i+1."""

    rows: int
    halves: bool


@functools.cache
def packing() -> Packing:
    """Return the packing of this machine's torch."""
    codes = torch.arange(_LARGEST_BLOCK, dtype=torch.int32).unsqueeze(1).expand(-1, 32)
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
    """Return uint8 (N, K / 2) for codes of 0 to 15, (N, K); N a multiple of 16, K of 2."""
    how = packing_ or packing()
    rows, columns = codes.shape
    codes = codes.to(torch.uint8)
    full = rows - rows % how.rows
    blocks = codes[:full].view(-1, how.rows, columns)
    if how.halves:
        both = blocks[:, : how.rows // 2] | (blocks[:, how.rows // 2 :] << 4)
    else:
        both = blocks[:, 0::2] | (blocks[:, 1::2] << 4)
    packed = both.transpose(1, 2).reshape(full, columns // 2)
    if full == rows:
        return packed
    tail = codes[full::2] | (codes[full + 1 :: 2] << 4)
    return torch.cat((packed, tail.t().reshape(-1, columns // 2)))


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
