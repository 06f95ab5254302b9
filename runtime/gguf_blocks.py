"""What the blocks of GGUF tensors mean, as `Codes`: every number of the file, none rounded.

The layouts are those of ggml's quantised types. Each block's scale (and minimum) becomes a
float32; all products that ggml forms from its float16 and small integers fit one exactly, and so
does the zero of a four-bit block unless its scale and minimum lie 2 ** 4 or more apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import Form
from runtime.gguf_types import BLOCKS
from runtime.weight_forms import PIECE_ROWS, Codes, dequantise, powers_of_two

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FORMS = {
    "Q4_0": Form("int4", 1, 32),
    "Q4_1": Form("int4", 1, 32, zeros=True),
    "Q4_K": Form("int4", 1, 32, zeros=True),
    "Q5_0": Form("int8", 1, 32),
    "Q5_1": Form("int8", 1, 32, zeros=True),
    "Q8_0": Form("int8", 1, 32),
    "IQ4_NL": Form("int8", 1, 32),
    "IQ4_XS": Form("int8", 1, 32),
    "Q5_K": Form("int8", 1, 32, zeros=True),
    "Q6_K": Form("int8", 1, 16),
    "MXFP4": Form("mxfp4", 1, 32),
}
_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# The sixteen steps of ggml's non-linear four-bit types.
_IQ4_STEPS = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8
)
_PIECE_BYTES = 2**19
"""What unpacking may make on the way."""


def common_form(kinds: Sequence[str]) -> Form:
    """Return the narrowest form that holds matrices of all these types exactly."""
    forms = [FORMS[kind] for kind in kinds]
    same = all(form.kind == forms[0].kind for form in forms)
    return Form(
        forms[0].kind if same else "int8",
        1,
        min(form.columns for form in forms),
        zeros=any(form.zeros for form in forms),
    )


def unpack(kind: str, raw: Bytes, columns: int) -> Codes:
    """Return the matrix (rows, columns) whose blocks of type `kind` are `raw`, uint8, flat.

    Its codes may be a view of `raw`.
    """
    per_block, block_bytes = BLOCKS[kind]
    assert columns % per_block == 0, (kind, columns)
    codes, scales, zeros, apart = _UNPACK[kind](raw.reshape(-1, block_bytes))
    groups = columns // FORMS[kind].columns
    return Codes(
        FORMS[kind],
        torch.from_numpy(codes.reshape(-1, columns // per_block, codes.shape[1])),
        torch.from_numpy(scales.reshape(-1, groups)),
        None if zeros is None else torch.from_numpy(zeros.reshape(-1, groups)),
        apart,
    )


def pieces(kind: str, raw: Bytes, columns: int, spread: bool = False) -> Iterator[Codes]:
    """Unpack a few rows at a time, so that what is made on the way stays small.

    `spread` says that numbers will not be used as they lie, but widened or stacked.
    """
    per_block, block_bytes = BLOCKS[kind]
    rows = raw.reshape(-1, columns // per_block * block_bytes)
    row_bytes = columns if kind in _MADE else 8 * columns // FORMS[kind].columns
    if spread:
        row_bytes = 4 * columns
    step = max(1, _PIECE_BYTES // row_bytes // PIECE_ROWS) * PIECE_ROWS
    for begin in range(0, len(rows), step):
        yield unpack(kind, rows[begin : begin + step], columns)


def widened(codes: Codes, form: Form) -> Codes:
    """Return the same numbers in `form`, one that `common_form` returned for their type."""
    numbers, scales, zeros, apart = codes.codes, codes.scales, codes.zeros, codes.apart
    if form.kind != codes.form.kind:
        assert form.kind == "int8", (codes.form, form)
        numbers, apart = codes.numbers, 0
        if codes.form.kind == "int4":
            numbers = numbers.to(torch.int8) - 8
        else:
            numbers = torch.tensor(_DOUBLED_E2M1, dtype=torch.int8)[numbers.long()]
            scales = scales / 2
    if form.zeros and zeros is None:
        zeros = torch.zeros_like(scales)
    times = codes.form.columns // form.columns
    if times > 1:
        scales = scales.repeat_interleave(times, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(times, 1)
    return Codes(form, numbers, scales, zeros, apart)


def stacked(matrices: Sequence[Codes], interleaved: bool) -> Codes:
    """Put the rows of matrices of one form and shape below each other, or in turns."""

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, 1).flatten(0, 1) if interleaved else torch.cat(tensors)

    zeros = [codes.zeros for codes in matrices if codes.zeros is not None]
    return Codes(
        matrices[0].form,
        join([codes.numbers for codes in matrices]),
        join([codes.scales for codes in matrices]),
        join(zeros) if zeros else None,
    )


def numbers_of(kind: str, raw: Bytes, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (rows, columns) that `raw` stands for, each number rounded once."""
    per_block, block_bytes = BLOCKS[kind]
    matrix = torch.empty((raw.size // block_bytes * per_block // columns, columns), dtype=dtype)
    begin = 0
    for codes in pieces(kind, raw, columns):
        for some in codes.in_pieces(columns):
            matrix[begin : begin + some.rows] = dequantise(some, dtype)
            begin += some.rows
    return matrix


_Unpacked = tuple[NDArray[Any], Floats, Floats | None, int]
"""Codes of each block, scales, zeros, and how `Codes.apart` tells that codes lie."""


def _half(blocks: Bytes, begin: int) -> Floats:
    """Return a float16 of every block as float32 (blocks, 1)."""
    found = np.empty((len(blocks), 1), np.float32)
    _loops().halves(_flat(blocks), blocks.shape[1], begin, _flat(found))
    return found


def _q4_0(blocks: Bytes) -> _Unpacked:
    return blocks[:, 2:], _half(blocks, 0), None, 16


def _q4_1(blocks: Bytes) -> _Unpacked:
    scale = _half(blocks, 0)
    with np.errstate(invalid="ignore"):  # a stranger's file may have infinities
        zeros = 8 * scale + _half(blocks, 2)
    return blocks[:, 4:], scale, zeros, 16


def _q5_0(blocks: Bytes) -> _Unpacked:
    return _five_bits(blocks, 2, 16), _half(blocks, 0), None, 0


def _q5_1(blocks: Bytes) -> _Unpacked:
    return _five_bits(blocks, 4, 0), _half(blocks, 0), _half(blocks, 2), 0


def _five_bits(blocks: Bytes, begin: int, middle: int) -> NDArray[np.int8]:
    numbers = np.empty((len(blocks), 32), np.int8)
    _loops().five_bits(_flat(blocks), blocks.shape[1], begin, middle, _flat(numbers))
    return numbers


def _iq4_nl(blocks: Bytes) -> _Unpacked:
    return _stepped(blocks, 2, 1), _half(blocks, 0), None, 0


def _iq4_xs(blocks: Bytes) -> _Unpacked:
    scales = np.empty((len(blocks), 8), np.float32)
    _loops().iq4_xs_scales(_flat(blocks), _flat(scales))
    return _stepped(blocks, 8, 8), scales, None, 0


def _stepped(blocks: Bytes, begin: int, runs: int) -> NDArray[np.int8]:
    numbers = np.empty((len(blocks), runs * 32), np.int8)
    raw, places = _flat(blocks), _flat(numbers)
    _loops().stepped(raw, blocks.shape[1], begin, runs, _IQ4_STEPS, places)
    return numbers


def _q8_0(blocks: Bytes) -> _Unpacked:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None, 0


def _mxfp4(blocks: Bytes) -> _Unpacked:
    return blocks[:, 1:], powers_of_two(torch.from_numpy(blocks[:, :1])).numpy(), None, 16


def _scales_and_zeros(blocks: Bytes, centred: bool) -> tuple[Floats, Floats]:
    """Return the float32 scales and zeros (blocks, 8) of Q4_K and Q5_K."""
    scales, zeros = np.empty((2, len(blocks), 8), np.float32)
    raw = _flat(blocks)
    _loops().scales_and_zeros(raw, blocks.shape[1], centred, _flat(scales), _flat(zeros))
    return scales, zeros


def _q4_k(blocks: Bytes) -> _Unpacked:
    return blocks[:, 16:], *_scales_and_zeros(blocks, True), 32


def _q5_k(blocks: Bytes) -> _Unpacked:
    scales, zeros = _scales_and_zeros(blocks, False)
    numbers = np.empty((len(blocks), 256), np.int8)
    _loops().q5_k(_flat(blocks), _flat(numbers))
    return numbers, scales, zeros, 0


def _q6_k(blocks: Bytes) -> _Unpacked:
    numbers = np.empty((len(blocks), 256), np.int8)
    scales = np.empty((len(blocks), 16), np.float32)
    _loops().q6_k(_flat(blocks), _flat(numbers))
    _loops().q6_k_scales(_flat(blocks), _flat(scales))
    return numbers, scales, None, 0


def _loops() -> ModuleType:
    """Import the compiled loops: only those who unpack wait for numba."""
    from runtime import gguf_loops

    return gguf_loops


def _flat(numbers: NDArray[Any]) -> NDArray[Any]:
    return numbers.reshape(-1)


_UNPACK = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
_MADE = {"Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q5_K", "Q6_K"}
"""Types whose numbers are put together first; those of the others are read as they lie."""
