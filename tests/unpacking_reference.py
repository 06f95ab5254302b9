"""What the compiled loops have to equal bit by bit: the same unpacking in torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.formats import Form, FormKind
from runtime.gguf_blocks import FORMS
from runtime.gguf_types import BLOCKS
from runtime.weight_forms import Codes, powers_of_two

_IQ4_STEPS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SMALLEST_SCALE = 1e-30
Unpacked = tuple[Tensor, Tensor, Tensor | None, int]


def unpack(kind: str, raw: Tensor, columns: int) -> Codes:
    """Return what GGUF blocks hold."""
    per_block, block_bytes = BLOCKS[kind]
    codes, scales, zeros, apart = _UNPACK[kind](raw.view(-1, block_bytes))
    groups = columns // FORMS[kind].columns
    return Codes(
        FORMS[kind],
        codes.view(-1, columns // per_block, *codes.shape[1:]),
        scales.reshape(-1, groups),
        None if zeros is None else zeros.reshape(-1, groups),
        apart,
    )


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Return a float16 of every block as float32 (blocks, 1)."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low halves of the bytes of a run, and then its high halves."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q4_0(blocks: Tensor) -> Unpacked:
    return blocks[:, 2:], _half(blocks, 0), None, 16


def _q4_1(blocks: Tensor) -> Unpacked:
    scale = _half(blocks, 0)
    return blocks[:, 4:], scale, 8 * scale + _half(blocks, 2), 16


def _fifth_bits(blocks: Tensor, begin: int) -> Tensor:
    """Return the fifth bit (blocks, 32) of each number, 16 where it is set."""
    bits = torch.arange(8, dtype=torch.uint8)
    return ((blocks[:, begin : begin + 4].unsqueeze(2) >> bits & 1) << 4).flatten(1)


def _q5_0(blocks: Tensor) -> Unpacked:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return numbers.to(torch.int8) - 16, _half(blocks, 0), None, 0


def _q5_1(blocks: Tensor) -> Unpacked:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return numbers.to(torch.int8), _half(blocks, 0), _half(blocks, 2), 0


def _stepped(nibbles: Tensor) -> Tensor:
    return torch.tensor(_IQ4_STEPS, dtype=torch.int8)[nibbles.int()]


def _iq4_nl(blocks: Tensor) -> Unpacked:
    return _stepped(_nibbles(blocks[:, 2:])), _half(blocks, 0), None, 0


def _iq4_xs(blocks: Tensor) -> Unpacked:
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).flatten(1)
    bits = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (blocks[:, 2:4].unsqueeze(2) >> bits & 3).flatten(1)
    scales = (low | (high << 4)).to(torch.int8) - 32
    numbers = _stepped(_nibbles(blocks[:, 8:].view(-1, 8, 16))).flatten(1)
    return numbers, _half(blocks, 0) * scales, None, 0


def _q8_0(blocks: Tensor) -> Unpacked:
    return blocks[:, 2:].view(torch.int8), _half(blocks, 0), None, 0


def _mxfp4(blocks: Tensor) -> Unpacked:
    return blocks[:, 1:], powers_of_two(blocks[:, :1]), None, 16


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 scales and minima (blocks, 8) of Q4_K and Q5_K: 6 bits each, packed."""
    # Four of them to an int32.
    first, second, third = blocks[:, 4:16].contiguous().view(torch.int32).unbind(1)
    upper = ((first >> 2) & 0x30303030, (second >> 2) & 0x30303030)
    lower = (third & 0x0F0F0F0F, (third >> 4) & 0x0F0F0F0F)
    words = (first & 0x3F3F3F3F, lower[0] | upper[0], second & 0x3F3F3F3F, lower[1] | upper[1])
    sixes = torch.stack(words, 1).view(torch.uint8).float()
    return _half(blocks, 0) * sixes[:, :8], _half(blocks, 2) * sixes[:, 8:]


def _q4_k(blocks: Tensor) -> Unpacked:
    scales, minima = _scales_and_minima(blocks)
    return blocks[:, 16:], scales, 8 * scales - minima, 32


def _q5_k(blocks: Tensor) -> Unpacked:
    scales, minima = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    bits = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = (blocks[:, 16:48].unsqueeze(1) >> bits) & 1
    return (low | (high << 4)).to(torch.int8).flatten(1), scales, -minima, 0


def _q6_k(blocks: Tensor) -> Unpacked:
    low = _nibbles(blocks[:, :128].view(-1, 2, 64))
    bits = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> bits) & 3
    numbers = (low | (high.flatten(2) << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return numbers.flatten(1), _half(blocks, 208) * scales, None, 0


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


def four_bits(words: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Return the eight numbers of each int32 of (N, words), at these places: (N, 8 * words)."""
    shifts = torch.tensor(places, dtype=torch.int32) * 4
    return (words.unsqueeze(2) >> shifts & 15).flatten(1).to(torch.uint8)


def quantise(matrix: Tensor, form: Form) -> Codes:
    """Return `matrix` in an int8 or int4 form of row groups."""
    rows, columns = matrix.shape
    width = form.columns or columns
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, columns // width))
    zeros = torch.empty((rows, columns // width)) if form.zeros else None
    scale_dtype: torch.dtype = getattr(torch, form.scale_dtype)
    groups = matrix.float().reshape(-1, columns // width, width)
    if zeros is None:
        scale = _symmetric(groups, form.kind, scale_dtype)
        numbers = _nearest(groups, scale, None, form.kind)
    else:
        scale, zero = _range(groups, form.kind, scale_dtype)
        fitted = _fitted(groups, _nearest(groups, scale, zero, form.kind), scale_dtype)
        scale, zero = torch.where(fitted[0] > 0, fitted[0], scale), fitted[1]
        numbers = _nearest(groups, scale, zero, form.kind)
        zeros.copy_(zero.squeeze(2))
    scales.copy_(scale.squeeze(2))
    codes.copy_(numbers.flatten(1))
    if form.kind == "int4":
        codes = codes.view(torch.uint8).add_(8)
    return Codes(form, codes, scales, zeros)


def _limits(kind: FormKind) -> tuple[int, int]:
    return (-8, 7) if kind == "int4" else (-128, 127)


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor | None, kind: FormKind) -> Tensor:
    numbers = groups / scale if zero is None else (groups - zero).div_(scale)
    return numbers.round_().clamp_(*_limits(kind))


def _symmetric(groups: Tensor, kind: FormKind, dtype: torch.dtype) -> Tensor:
    largest = groups.abs().amax(2, keepdim=True)
    return (largest / _limits(kind)[1]).clamp_(min=_SMALLEST_SCALE).to(dtype).float()


def _range(groups: Tensor, kind: FormKind, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    least, most = _limits(kind)
    scale = ((high - low) / (most - least)).clamp_(min=_SMALLEST_SCALE).to(dtype).float()
    return scale, ((low + high - scale * (least + most)) / 2).to(dtype).float()


def _fitted(groups: Tensor, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and zero with the least squared error for `numbers`; scale 0: all equal.

    Nothing is left of `numbers`.
    """
    middle, mean = numbers.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    apart = numbers.sub_(middle)
    spread = apart.square().sum(2, keepdim=True)
    scale = apart.mul_(groups).sum(2, keepdim=True) / spread.clamp(min=_SMALLEST_SCALE)
    scale = scale.to(dtype).float()
    return scale, (mean - scale * middle).to(dtype).float()
