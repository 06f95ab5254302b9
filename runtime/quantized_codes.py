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
from torch import Tensor

from runtime.formats import Form
from runtime.weight_forms import PIECE_ROWS, Codes, powers_of_two
from runtime.weight_packing import exchange, turned

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
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
    for outputs in _outputs(scales.shape[1], len(qweight)):
        words = slice(outputs.start // 8, outputs.stop // 8)
        zeros = _awq_zeros(qzeros[:, words])
        wide = scales[:, outputs].t().float().contiguous()
        yield Codes(form, _awq_rows(qweight[:, words]), wide, (8 - zeros) * wide, apart=1)


def _awq_rows(words: Tensor) -> Tensor:
    """int32 (K, N / 8), outputs in AutoAWQ's order, to int32 (N, K / 8), inputs in order."""
    inputs, outputs = words.shape
    # Eight words below each other are a square of four-bit numbers, which is turned.
    square = words.numpy().view(np.uint32).reshape(inputs // 8, 8, outputs).swapaxes(0, 1).copy()
    exchange(square[:4], square[4:], 16)
    for bits, step in ((8, 2), (4, 1)):
        pairs = square.reshape(4 // step, 2, step, -1)
        exchange(pairs[:, 0], pairs[:, 1], bits)
    rows = np.empty((outputs, 8, inputs // 8), dtype=np.uint32)
    for output, place in enumerate(_AWQ_PLACES):
        rows[:, output] = turned(square[place])
    return torch.from_numpy(rows.view(np.int32)).flatten(0, 1)


def _awq_zeros(words: Tensor) -> Tensor:
    """int32 (groups, N / 8), outputs in AutoAWQ's order, to float32 (N, groups)."""
    places = torch.tensor(_AWQ_PLACES) * 4
    return (words.t().unsqueeze(1) >> places[:, None].int() & 15).flatten(0, 1).float()


def gptq(
    form: Form, qweight: Tensor, scales: Tensor, qzeros: Tensor, zeros_less_one: bool
) -> tuple[Iterable[Codes], bool]:
    """`qweight` int32 (K * bits / 32, N), `qzeros` int32 (K / group, N * bits / 32).

    `scales` is (K / group, N). Also says whether a form without zeros may stand for these.
    """
    zeros, middle = qzeros.view(torch.uint8), 128
    if form.kind == "int4":
        zeros, middle = _nibbles(zeros), 8
    # uint8 wraps where the zero point 0 was kept as the largest number.
    zeros = ((zeros + int(zeros_less_one)) & (2 * middle - 1)).t()
    wide = scales.t().float().contiguous()
    offsets = (middle - zeros.float()) * wide if form.zeros else None
    return _rows(form, qweight.t(), wide, offsets), bool((zeros == middle).all())


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
    zeros = None if codes.zeros is None else _finer(codes, codes.zeros, form)
    return replace(codes, form=form, scales=_finer(codes, codes.scales, form), zeros=zeros)


def _finer(piece: Codes, blocks: Tensor, form: Form) -> Tensor:
    rows = -(-piece.codes.shape[0] // form.rows)
    return blocks.repeat_interleave(piece.form.rows // form.rows, 0)[:rows]


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
