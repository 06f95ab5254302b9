"""From the packed tensors of each quantised file format to `Codes`: arithmetic only, no names.

The layouts are those of the programs that write them: AutoAWQ's GEMM packing, AutoGPTQ and
GPTQModel, the compressed-tensors library, DeepSeek's FP8 blocks, and the OCP MX specification.
Four-bit numbers lie eight to an int32, the lowest bits first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.formats import Form
from runtime.weight_forms import Codes

_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def plain(form: Form, weight: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Codes:
    """One number per byte, as they are.

    `weight` (N, K) float8_e4m3fn or int8; `scales` one per block in any float dtype, or uint8 for
    powers of two; `zero_points`, where there are any, one per block.
    """
    grid = _grid(form, *weight.shape)
    scales = _float(scales).reshape(grid)
    if zero_points is None:
        return Codes(form, weight, scales)
    return Codes(form, weight, scales, -zero_points.float().reshape(grid) * scales)


def mxfp4(form: Form, blocks: Tensor, scales: Tensor) -> Codes:
    """`blocks` uint8 (N, K / 32, 16) or int8 (N, K / 2); `scales` uint8 (N, K / 32).

    A scale s is 2 ** (s - 127); 255 is no number, and the next power of two takes its place.
    """
    numbers = _nibbles(blocks.view(torch.uint8)).flatten(1)
    return Codes(form, numbers, _float(scales.clamp(max=254)))


def awq(form: Form, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Codes:
    """`qweight` int32 (K, N / 8), `qzeros` int32 (K / group, N / 8), `scales` (K / group, N)."""
    zeros = _awq_numbers(qzeros).float()
    wide = scales.t().float().contiguous()
    return Codes(form, _awq_numbers(qweight), wide, (8 - zeros) * wide)


def _awq_numbers(words: Tensor) -> Tensor:
    """int32 (rows, N / 8), outputs in AutoAWQ's order, to uint8 (N, rows)."""
    words = _turned(words)
    numbers = torch.empty((words.shape[0], 8, words.shape[1]), dtype=torch.uint8)
    for place, output in enumerate(_AWQ_OUTPUTS):
        numbers[:, output] = (words >> (4 * place)) & 15
    return numbers.flatten(0, 1)


def gptq(
    form: Form, qweight: Tensor, scales: Tensor, qzeros: Tensor, zeros_less_one: bool
) -> tuple[Codes, bool]:
    """`qweight` int32 (K * bits / 32, N), `qzeros` int32 (K / group, N * bits / 32).

    `scales` is (K / group, N). Also says whether a form without zeros may stand for these.
    """
    numbers, zeros = _turned(qweight).view(torch.uint8), qzeros.view(torch.uint8)
    middle = 128
    if form.kind == "int4":
        numbers, zeros, middle = _nibbles(numbers), _nibbles(zeros), 8
    # uint8 wraps where the zero point 0 was kept as the largest number.
    zeros = ((zeros + int(zeros_less_one)) & (2 * middle - 1)).t()
    wide = scales.t().float().contiguous()
    offsets = (middle - zeros.float()) * wide if form.zeros else None
    return Codes(form, _centred(form, numbers), wide, offsets), bool((zeros == middle).all())


def packed(form: Form, weight: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Codes:
    """compressed-tensors: `weight` int32 (N, K * bits / 32), `scales` (N, K / group).

    `zero_points` int32 (N * bits / 32, K / group), packed along the outputs.
    """
    outputs = weight.shape[0]
    numbers = weight.view(torch.uint8)
    scales = scales.float().reshape(outputs, -1)
    middle = 128
    if form.kind == "int4":
        numbers, middle = _nibbles(numbers), 8
    if zero_points is None:
        return Codes(form, _centred(form, numbers), scales)
    zeros = _turned(zero_points).view(torch.uint8)
    if form.kind == "int4":
        zeros = _nibbles(zeros)
    offsets = (middle - zeros[:, :outputs].t().float()) * scales
    return Codes(form, _centred(form, numbers), scales, offsets)


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


def join(form: Form, pieces: Sequence[Codes]) -> Codes:
    """Put matrices below each other; `form` is what `joined_form` said of theirs."""
    if len(pieces) == 1:
        return pieces[0]
    codes = torch.cat([piece.codes for piece in pieces])
    scales = torch.cat([_finer(piece, piece.scales, form) for piece in pieces])
    zeros = [_finer(piece, piece.zeros, form) for piece in pieces if piece.zeros is not None]
    return Codes(form, codes, scales, torch.cat(zeros) if zeros else None)


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


def _centred(form: Form, numbers: Tensor) -> Tensor:
    return (numbers ^ 128).view(torch.int8) if form.kind == "int8" else numbers


def _float(scales: Tensor) -> Tensor:
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _grid(form: Form, rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // form.rows), -(-columns // (form.columns or columns))
