"""From the packed tensors of each quantised file format to `Codes`: arithmetic only, no names.

The layouts are those of the programs that write them: AutoAWQ's GEMM packing, AutoGPTQ and
GPTQModel, the compressed-tensors library, DeepSeek's FP8 blocks, and the OCP MX specification.
Four-bit numbers lie eight to an int32, the lowest bits first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import Form
from runtime.weight_forms import AWQ_PLACES, PIECE_ROWS, Codes, powers_of_two

Words = NDArray[np.int32]
Floats = NDArray[np.float32]

_IN_ORDER = np.arange(8, dtype=np.uint64)
_AWQ_ORDER = np.array(AWQ_PLACES, np.uint64)
_PIECE_NUMBERS = 2**19
"""So many numbers are made at once where they cannot be packed as they lie."""


def plain(
    form: Form, weight: NDArray[Any], scales: NDArray[Any], zero_points: NDArray[Any] | None = None
) -> Iterable[Codes]:
    """One number per byte, as they are.

    `weight` (N, K) int8, or uint8 for float8_e4m3fn; `scales` float32, one per block, or uint8 for
    powers of two; `zero_points`, where there are any, one per block.
    """
    grid = _grid(form, *weight.shape)
    numbers = torch.from_numpy(weight)
    if form.kind == "fp8":
        numbers = numbers.view(torch.float8_e4m3fn)
    factors = torch.from_numpy(scales)
    if factors.dtype == torch.uint8:
        factors = factors.view(torch.float8_e8m0fnu)
    factors = factors.float().reshape(grid)
    if zero_points is None:
        return [Codes(form, numbers, factors)]
    points = torch.from_numpy(zero_points).float().reshape(grid)
    return [Codes(form, numbers, factors, -points * factors)]


def mxfp4(form: Form, blocks: NDArray[Any], scales: NDArray[np.uint8]) -> Iterable[Codes]:
    """`blocks` uint8 (N, K / 32, 16) or int8 (N, K / 2); `scales` uint8 (N, K / 32).

    A scale s is 2 ** (s - 127); 255 is no number, and the next power of two takes its place.
    """
    numbers = torch.from_numpy(blocks.view(np.uint8)).flatten(1)
    return [Codes(form, numbers, powers_of_two(torch.from_numpy(scales)), apart=1)]


def awq(form: Form, qweight: Words, scales: Floats, qzeros: Words) -> Iterable[Codes]:
    """`qweight` int32 (K, N / 8), `qzeros` int32 (K / group, N / 8), `scales` (K / group, N)."""
    # Only those who unpack wait for numba to be imported.
    from runtime.quantized_loops import zeros_of

    _check_shapes(scales, qzeros)
    if 8 * qweight.shape[1] != scales.shape[1]:
        raise ValueError(f"words {qweight.shape} for scales {scales.shape}")
    zeros = np.empty_like(scales)
    zeros_of(qzeros.view(np.uint32), _AWQ_ORDER, False, scales, zeros)
    words, factors, offsets = (torch.from_numpy(each.T) for each in (qweight, scales, zeros))
    return [Codes(form, words, factors, offsets, eights=True)]


def _check_shapes(scales: Floats, qzeros: Words) -> None:
    """The loops check nothing: this is what keeps them within their memory."""
    if (len(qzeros), 8 * qzeros.shape[1]) != scales.shape:
        raise ValueError(f"zeros {qzeros.shape} for scales {scales.shape}")


def gptq(
    form: Form, qweight: Words, scales: Floats, qzeros: Words, zeros_less_one: bool
) -> tuple[Iterable[Codes], bool]:
    """`qweight` int32 (K * bits / 32, N), `qzeros` int32 (K / group, N * bits / 32).

    `scales` is (K / group, N). Also says whether a form without zeros may stand for these.
    """
    if form.kind == "int4":
        # Only those who unpack wait for numba to be imported.
        from runtime.quantized_loops import zeros_of

        _check_shapes(scales, qzeros)
        points, offsets = qzeros.view(np.uint32), np.empty_like(scales)
        symmetric = bool(zeros_of(points, _IN_ORDER, zeros_less_one, scales, offsets))
    else:
        # uint8 wraps where the zero point 0 was kept as the largest number.
        zeros = qzeros.view(np.uint8) + np.uint8(zeros_less_one)
        symmetric = bool((zeros == 128).all())
        with np.errstate(invalid="ignore"):  # a stranger's scales may be infinite
            offsets = (np.float32(128) - zeros.astype(np.float32)) * scales
    return _rows(form, qweight.T, scales.T, offsets.T if form.zeros else None), symmetric


def packed(
    form: Form, weight: Words, scales: Floats, zero_points: Words | None = None
) -> Iterable[Codes]:
    """compressed-tensors: `weight` int32 (N, K * bits / 32), `scales` (N, K / group).

    `zero_points` int32 (N * bits / 32, K / group), packed along the outputs.
    """
    outputs = len(weight)
    scales = scales.reshape(outputs, -1)
    if zero_points is None:
        return _rows(form, weight, scales, None)
    zeros, middle = np.ascontiguousarray(zero_points.T).view(np.uint8), 128
    if form.kind == "int4":
        zeros, middle = np.stack((zeros & 15, zeros >> 4), 2).reshape(len(zeros), -1), 8
    with np.errstate(invalid="ignore"):  # a stranger's scales may be infinite
        offsets = (np.float32(middle) - zeros[:, :outputs].T.astype(np.float32)) * scales
    return _rows(form, weight, scales, offsets)


def _rows(form: Form, words: Words, scales: Floats, zeros: Floats | None) -> Iterator[Codes]:
    """Codes from words (N, K * bits / 32), those of eight bits kept as if they had no sign."""
    factors = torch.from_numpy(scales)
    offsets = None if zeros is None else torch.from_numpy(zeros)
    if form.kind == "int4":
        yield Codes(form, torch.from_numpy(words), factors, offsets, apart=1)
        return
    for rows in _outputs(len(words), 4 * words.shape[1]):
        numbers = np.ascontiguousarray(words[rows]).view(np.uint8) ^ np.uint8(128)
        signed = torch.from_numpy(numbers.view(np.int8))
        yield Codes(form, signed, factors[rows], None if offsets is None else offsets[rows])


def _outputs(outputs: int, inputs: int) -> Iterator[slice]:
    """Cut the outputs of a matrix, so that what is made of each piece stays small."""
    step = max(1, _PIECE_NUMBERS // inputs // PIECE_ROWS) * PIECE_ROWS
    for begin in range(0, outputs, step):
        yield slice(begin, min(begin + step, outputs))


def joined_form(forms: Sequence[Form], outputs: Sequence[int]) -> Form | None:
    """Return the form of matrices put below each other, or None where none fits them all."""
    first = forms[0]
    if any((f.kind, f.columns, f.zeros) != (first.kind, first.columns, first.zeros) for f in forms):
        return None
    if len(forms) == 1:
        return first
    # Blocks must not reach from one matrix into the next.
    rows = math.gcd(*(form.rows for form in forms), *outputs[:-1])
    return Form(first.kind, rows, first.columns, first.zeros)


def join(form: Form, matrices: Sequence[Codes]) -> Codes:
    """Put matrices below each other; `form` is what `joined_form` said of theirs."""
    codes = torch.cat([piece.numbers for piece in matrices])
    scales = torch.cat([_finer(piece, piece.scales, form) for piece in matrices])
    zeros = [_finer(piece, piece.zeros, form) for piece in matrices if piece.zeros is not None]
    return Codes(form, codes, scales, torch.cat(zeros) if zeros else None)


def finer(codes: Codes, form: Form) -> Codes:
    """Return one of the matrices that `joined_form` was told of, in the form it returned."""
    if codes.form == form:
        return codes
    zeros = None if codes.zeros is None else _finer(codes, codes.zeros, form)
    return replace(codes, form=form, scales=_finer(codes, codes.scales, form), zeros=zeros)


def _finer(piece: Codes, blocks: Tensor, form: Form) -> Tensor:
    rows = -(-piece.rows // form.rows)
    return blocks.repeat_interleave(piece.form.rows // form.rows, 0)[:rows]


def _grid(form: Form, rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // form.rows), -(-columns // (form.columns or columns))
