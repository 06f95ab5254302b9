"""Words of AWQ and GPTQ: every code and zero what their layouts say, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime import quantized_codes, weight_forms
from runtime.formats import Form, Matrix, lay_out
from runtime.kernels import views
from runtime.weight_forms import Codes, encode, held, memories, parts_of
from tests.unpacking_reference import four_bits

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# Outputs, inputs, group: rows that fill no block, groups that no op knows, one group for all.
SIZES = [(16, 64, 32), (8, 24, 8), (144, 96, 96), (40, 160, 32), (208, 512, 128), (64, 1048, 0)]


def words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def some_scales(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    scales = torch.randn(shape, generator=generator).to(torch.float16)
    scales[0, :4] = torch.tensor([0.0, -6e-8, 65504.0, -0.0])
    return scales


def wide_of(scales: Tensor) -> NDArray[np.float32]:
    wide: NDArray[np.float32] = scales.float().numpy()
    return wide


def below(pieces: list[Codes]) -> tuple[Tensor, Tensor, Tensor | None]:
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    numbers, scales = ([getattr(piece, name) for piece in pieces] for name in ("numbers", "scales"))
    return torch.cat(numbers), torch.cat(scales), torch.cat(zeros) if zeros else None


def held_again(form: Form, shape: tuple[int, int], pieces: list[Codes]) -> Codes:
    matrix = Matrix("w", shape, form)
    layout = lay_out(parts_of(matrix), [matrix])
    flat = torch.full((layout.size_bytes,), 0xA5, dtype=torch.uint8)
    first = 0
    for codes in pieces:
        encode(codes, matrix, memories(flat.numpy(), layout), first)
        first += codes.rows
    return held(matrix, views(flat, layout))


@pytest.mark.parametrize("spread", [2**18, 1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_awq(size: tuple[int, int, int], spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_forms, "_SPREAD_NUMBERS", spread)
    outputs, inputs, group = size
    groups = inputs // group if group else 1
    form = Form("int4", 1, group, zeros=True)
    qweight, qzeros = words(inputs, outputs // 8), words(groups, outputs // 8, seed=1)
    scales = some_scales(groups, outputs)
    pieces = list(quantized_codes.awq(form, qweight.numpy(), wide_of(scales), qzeros.numpy()))
    numbers, wide, zeros = below(pieces)
    assert torch.equal(numbers, four_bits(qweight, AWQ_PLACES).t())
    assert torch.equal(wide, scales.t().float())
    points = four_bits(qzeros, AWQ_PLACES).t().float()
    assert zeros is not None
    assert torch.equal(zeros, (8 - points) * scales.t().float())
    again = held_again(form, (outputs, inputs), pieces)
    assert torch.equal(again.numbers, numbers)
    assert torch.equal(again.scales, wide)
    assert again.zeros is not None
    assert torch.equal(again.zeros, zeros)


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gptq(size: tuple[int, int, int], less_one: bool) -> None:
    outputs, inputs, group = size
    groups = inputs // group if group else 1
    form = Form("int4", 1, group, zeros=True)
    qweight, qzeros = words(inputs // 8, outputs), words(groups, outputs // 8, seed=1)
    scales = some_scales(groups, outputs)
    unpacked, symmetric = quantized_codes.gptq(
        form, qweight.numpy(), wide_of(scales), qzeros.numpy(), less_one
    )
    pieces = list(unpacked)
    numbers, wide, zeros = below(pieces)
    assert not symmetric
    assert torch.equal(numbers, four_bits(qweight.t().contiguous()))
    points = (four_bits(qzeros).t().int() + int(less_one)) & 15
    assert zeros is not None
    assert torch.equal(zeros, (8 - points.float()) * scales.t().float())
    again = held_again(form, (outputs, inputs), pieces)
    assert torch.equal(again.numbers, numbers)
    assert torch.equal(again.scales, wide)


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_without_zeros_says_so(less_one: bool) -> None:
    form = Form("int4", 1, 32)
    qzeros = torch.full((2, 4), 0x77777777 if less_one else -0x77777778, dtype=torch.int32)
    scales, qweight = some_scales(2, 32), words(8, 32)
    (codes,), symmetric = quantized_codes.gptq(
        form, qweight.numpy(), wide_of(scales), qzeros.numpy(), less_one
    )
    assert symmetric
    assert codes.zeros is None
    qzeros[1, 3] ^= 1 << 28
    assert not quantized_codes.gptq(
        form, qweight.numpy(), wide_of(scales), qzeros.numpy(), less_one
    )[1]
