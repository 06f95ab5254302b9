"""From the packed tensors of each quantised file format to `Codes`: arithmetic only, no names.

The layouts are those of the programs that write them: AutoAWQ's GEMM packing, AutoGPTQ and
GPTQModel, the compressed-tensors library, DeepSeek's FP8 blocks, and the OCP MX specification.
Four-bit numbers lie eight to an int32, the lowest bits first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import Form
from runtime.weight_forms import PIECE_ROWS, Codes, powers_of_two

_IN_ORDER = np.arange(8, dtype=np.uint64)
_AWQ_PLACES = np.array((0, 4, 1, 5, 2, 6, 3, 7), np.uint64)
"""Which four bits of a word, counted from the lowest, each of its eight outputs has."""
_PIECE_NUMBERS = 2**19


def plain(
    form: Form, weight: Tensor, scales: Tensor, zero_points: Tensor | None = None
) -> Iterable[Codes]:
    """One number per byte, as they are.

    `weight` (N, K) float8_e4m3fn or int8; `scales` one per block in any float dtype, or uint8 for
    powers of two; `zero_points`, where there are any, one per block.
    """
    grid = _grid(form, *weight.shape)
    scales = _float(scales).reshape(grid)
    if zero_points is None:
        return [Codes(form, weight, scales)]
    return [Codes(form, weight, scales, -zero_points.float().reshape(grid) * scales)]


def mxfp4(form: Form, blocks: Tensor, scales: Tensor) -> Iterable[Codes]:
    """`blocks` uint8 (N, K / 32, 16) or int8 (N, K / 2); `scales` uint8 (N, K / 32).

    A scale s is 2 ** (s - 127); 255 is no number, and the next power of two takes its place.
    """
    powers = powers_of_two(scales.view(torch.uint8))
    return [Codes(form, blocks.view(torch.uint8).flatten(1), powers, apart=1)]


def awq(form: Form, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Iterator[Codes]:
    """`qweight` int32 (K, N / 8), `qzeros` int32 (K / group, N / 8), `scales` (K / group, N)."""
    # Only those who unpack wait for numba to be imported.
    from runtime import quantized_loops as loops

    _check_shapes(scales, qzeros)
    if len(qweight) % 8 or 8 * qweight.shape[1] != scales.shape[1]:
        raise ValueError(f"words {tuple(qweight.shape)} for scales {tuple(scales.shape)}")
    words, wide = _unsigned(qweight), scales.float()
    zeros = torch.empty_like(wide)
    loops.zeros_of(_unsigned(qzeros), _AWQ_PLACES, False, wide.numpy(), zeros.numpy())
    for outputs in _outputs(scales.shape[1], len(qweight)):
        turned = torch.empty((len(qweight) // 8, outputs.stop - outputs.start), dtype=torch.int32)
        loops.turn_words(words, _AWQ_PLACES, outputs.start, _unsigned(turned))
        yield Codes(form, turned.t(), wide[:, outputs].t(), zeros[:, outputs].t(), apart=1)


def _check_shapes(scales: Tensor, qzeros: Tensor) -> None:
    """The loops check nothing: this is what keeps them within their memory."""
    if (len(qzeros), 8 * qzeros.shape[1]) != tuple(scales.shape):
        raise ValueError(f"zeros {tuple(qzeros.shape)} for scales {tuple(scales.shape)}")


def gptq(
    form: Form, qweight: Tensor, scales: Tensor, qzeros: Tensor, zeros_less_one: bool
) -> tuple[Iterable[Codes], bool]:
    """`qweight` int32 (K * bits / 32, N), `qzeros` int32 (K / group, N * bits / 32).

    `scales` is (K / group, N). Also says whether a form without zeros may stand for these.
    """
    wide = scales.float()
    if form.kind == "int4":
        # Only those who unpack wait for numba to be imported.
        from runtime.quantized_loops import zeros_of

        _check_shapes(scales, qzeros)
        points, offsets = _unsigned(qzeros), torch.empty_like(wide)
        symmetric = zeros_of(points, _IN_ORDER, zeros_less_one, wide.numpy(), offsets.numpy())
    else:
        # uint8 wraps where the zero point 0 was kept as the largest number.
        zeros = qzeros.view(torch.uint8) + int(zeros_less_one)
        symmetric, offsets = bool((zeros == 128).all()), (128 - zeros.float()) * wide
    return _rows(form, qweight.t(), wide.t(), offsets.t() if form.zeros else None), symmetric


def packed(
    form: Form, weight: Tensor, scales: Tensor, zero_points: Tensor | None = None
) -> Iterable[Codes]:
    """compressed-tensors: `weight` int32 (N, K * bits / 32), `scales` (N, K / group).

    `zero_points` int32 (N * bits / 32, K / group), packed along the outputs.
    """
    outputs = weight.shape[0]
    scales = scales.float().reshape(outputs, -1)
    if zero_points is None:
        return _rows(form, weight, scales, None)
    zeros, middle = _turned(zero_points).view(torch.uint8), 128
    if form.kind == "int4":
        zeros, middle = _nibbles(zeros), 8
    offsets = (middle - zeros[:, :outputs].t().float()) * scales
    return _rows(form, weight, scales, offsets)


def _rows(form: Form, words: Tensor, scales: Tensor, zeros: Tensor | None) -> Iterator[Codes]:
    """Codes from words (N, K * bits / 32), those of eight bits kept as if they had no sign."""
    if form.kind == "int4":
        yield Codes(form, words, scales, zeros, apart=1)
        return
    for rows in _outputs(len(words), 4 * words.shape[1]):
        numbers = words[rows].clone(memory_format=torch.contiguous_format).view(torch.uint8)
        signed = numbers.bitwise_xor_(128).view(torch.int8)
        yield Codes(form, signed, scales[rows], None if zeros is None else zeros[rows])


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
    rows = -(-piece.codes.shape[0] // form.rows)
    return blocks.repeat_interleave(piece.form.rows // form.rows, 0)[:rows]


def _unsigned(words: Tensor) -> NDArray[np.uint32]:
    """Return the memory of int32 words."""
    return words.numpy().view(np.uint32)


def _turned(words: Tensor) -> Tensor:
    # `contiguous` may leave the strides of an axis of one as they are, and `view` minds them.
    return words.t().clone(memory_format=torch.contiguous_format)


def _nibbles(numbers: Tensor) -> Tensor:
    """uint8 (..., n) of two numbers each to (..., 2 n), low ones first."""
    wide = numbers.to(torch.int16)
    return (wide | (wide << 4)).bitwise_and_(0x0F0F).view(torch.uint8)


def _float(scales: Tensor) -> Tensor:
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _grid(form: Form, rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // form.rows), -(-columns // (form.columns or columns))
