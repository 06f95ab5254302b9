"""How one expert's bytes lie in a slot: named parts at aligned offsets. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ALIGNMENT_BYTES = 64
DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
}
FormKind = Literal["int8", "int4", "fp8", "mxfp4"]
ScaleDtype = Literal["float32", "bfloat16"]


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
class Form:
    """How the numbers of a quantised matrix are held.

    A block of `rows` x `columns` of them (outputs x inputs) shares a scale; 0 columns stand for
    whole rows. `zeros` says whether a block has an offset beside its scale. Scales and zeros are
    rounded to `scale_dtype`; those of mxfp4 are powers of two and held as such.
    """

    kind: FormKind
    rows: int = 1
    columns: int = 0
    zeros: bool = False
    scale_dtype: ScaleDtype = "float32"

    def same_codes(self, other: Form) -> bool:
        """Say whether nothing but the dtype of scales differs."""
        return (self.kind, self.rows, self.columns, self.zeros) == (
            other.kind,
            other.rows,
            other.columns,
            other.zeros,
        )


@dataclass(frozen=True)
class Matrix:
    """A matrix of an expert that is held quantised: `shape` is always (outputs, inputs).

    The experts module may keep its plain weights the other way round; quantised ones never are.
    `runtime.weight_forms` says which parts hold it: they are named `name` and `name.something`.
    """

    name: str
    shape: tuple[int, int]
    form: Form


@dataclass(frozen=True)
class ExpertFormat:
    """The layout that every expert of one MoE layer shares, in RAM and in a slot alike.

    Parts that belong to no matrix of `matrices` are plain tensors.
    """

    parts: tuple[Part, ...]
    size_bytes: int
    matrices: tuple[Matrix, ...] = ()


def lay_out(
    tensors: Sequence[tuple[str, tuple[int, ...], str]], matrices: Sequence[Matrix] = ()
) -> ExpertFormat:
    """Place (name, shape, dtype) tensors one after another at 64-byte boundaries."""
    parts = []
    offset = 0
    for name, shape, dtype in tensors:
        part = Part(name, shape, dtype, offset)
        parts.append(part)
        offset += -(-part.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return ExpertFormat(tuple(parts), offset, tuple(matrices))
