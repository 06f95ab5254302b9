"""How one expert's bytes lie in a slot: named parts at aligned offsets. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Part:
    """One tensor of an expert: `shape` without the expert dimension, `dtype` as torch names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ExpertFormat:
    """The layout that every expert of one MoE layer shares, in RAM and in a slot alike."""

    parts: tuple[Part, ...]
    size_bytes: int


def lay_out(tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> ExpertFormat:
    """Place (name, shape, dtype) tensors one after another at 64-byte boundaries."""
    parts = []
    offset = 0
    for name, shape, dtype in tensors:
        part = Part(name, shape, dtype, offset)
        parts.append(part)
        offset += -(-part.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return ExpertFormat(tuple(parts), offset)
