"""Quantised matrices: what is written is what is read, and what is computed from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from runtime.formats import Form, Matrix, ScaleDtype, lay_out
from runtime.kernels import ExpertMath, views
from runtime.kernels_quantised import multiply
from runtime.weight_forms import (
    MXFP4_VALUES,
    Codes,
    dequantise,
    encode,
    form_for,
    held,
    memories,
    parts_of,
)
from tests.weight_codes import FORMS, laid_out, random_codes

SHAPES = [(16, 32), (64, 128), (80, 96), (256, 64), (48, 320)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_codes_come_back_as_they_were_written(name: str, shape: tuple[int, int]) -> None:
    codes = random_codes(FORMS[name], shape)
    layout, flat = laid_out({"w": codes}, {})
    back = held(layout.matrices[0], views(flat, layout))
    assert back.form == codes.form
    assert torch.equal(back.codes.view(torch.uint8), codes.codes.view(torch.uint8))
    assert torch.equal(back.scales, codes.scales)
    assert (back.zeros is None) == (codes.zeros is None)
    if codes.zeros is not None and back.zeros is not None:
        assert torch.equal(back.zeros, codes.zeros)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_of_any_bits_are_rounded_as_torch_rounds(
    dtype: ScaleDtype, turned: bool, zeros: bool
) -> None:
    """In pieces, as files give them: rows first, or groups first and turned round."""
    form = Form("int4", 1, 32, zeros, dtype)
    rows, groups = 208, 33
    generator = torch.Generator().manual_seed(groups)

    def any_bits() -> torch.Tensor:
        bits = torch.randint(-(2**31), 2**31, (groups, rows), generator=generator)
        numbers = bits.to(torch.int32).view(torch.float32)
        numbers[0, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
        return numbers.t() if turned else numbers.t().contiguous()

    numbers = torch.zeros((rows, 32 * groups), dtype=torch.uint8)
    codes = Codes(form, numbers, any_bits(), any_bits() if zeros else None)
    matrix = Matrix("w", (rows, 32 * groups), form)
    layout = lay_out(parts_of(matrix), [matrix])
    flat = torch.full((layout.size_bytes,), 0xA5, dtype=torch.uint8)
    for begin, end in ((0, 64), (64, 192), (192, rows)):
        some = slice(begin, end)
        piece = Codes(form, numbers[some], codes.scales[some])
        if codes.zeros is not None:
            piece = replace(piece, zeros=codes.zeros[some])
        encode(piece, matrix, memories(flat.numpy(), layout), begin)
    back = held(matrix, views(flat, layout))
    for written, read in ((codes.scales, back.scales), (codes.zeros, back.zeros)):
        if written is None or read is None:
            assert written is read
            continue
        rounded = written.to(getattr(torch, dtype)).float()
        assert torch.equal(rounded.isnan(), read.isnan())
        same = rounded.contiguous().view(torch.int32) == read.contiguous().view(torch.int32)
        assert (same | read.isnan()).all()


@pytest.mark.parametrize("name", FORMS)
def test_dequantise_is_what_the_form_says_number_by_number(name: str) -> None:
    form = FORMS[name]
    codes = random_codes(form, (16, 64))
    matrix = dequantise(codes, torch.float32)
    columns = form.columns or 64
    for row in range(16):
        for column in range(0, 64, 7):
            code = codes.codes[row, column].item()
            value = code - 8 if form.kind == "int4" else code
            if form.kind == "mxfp4":
                value = MXFP4_VALUES[int(code)]
            block = (row // form.rows, column // columns)
            expected = torch.tensor(value, dtype=torch.float32) * codes.scales[block]
            if codes.zeros is not None:
                expected = expected + codes.zeros[block]
            assert matrix[row, column] == expected


def math_of(transposed: bool, biases: bool, in_float32: bool = False) -> ExpertMath:
    def activate(inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return silu(gate) * up

    return ExpertMath(
        "up",
        "down",
        "up_bias" if biases else None,
        "down_bias" if biases else None,
        transposed,
        activate,
        in_float32=in_float32,
    )


def plain_rows(
    math: ExpertMath, up: Codes, down: Codes, plain: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The same expert from dequantised matrices, in float32."""
    inner = linear(x.float(), dequantise(up, torch.float32), plain.get("up_bias"))
    inner = math.activate(inner)
    return linear(inner, dequantise(down, torch.float32), plain.get("down_bias"))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("family", ["plain", "transposed with biases", "in float32"])
@pytest.mark.parametrize("name", FORMS)
@torch.inference_mode()
def test_rows_are_those_of_the_dequantised_matrices(name: str, family: str, tokens: int) -> None:
    hidden, width = 64, 96
    biases = "biases" in family
    math = math_of("transposed" in family, biases, "float32" in family)
    up = random_codes(FORMS[name], (2 * width, hidden), 1)
    down = random_codes(FORMS[name], (hidden, width), 2)
    generator = torch.Generator().manual_seed(3)
    plain = {}
    if biases:
        plain["up_bias"] = torch.randn(2 * width, generator=generator)
        plain["down_bias"] = torch.randn(hidden, generator=generator)
    layout, flat = laid_out({"up": up, "down": down}, plain)
    x = torch.randn((tokens, hidden), generator=generator)
    weights = torch.rand((tokens, 1), generator=generator)
    actual = math.reading(layout).rows(views(flat, layout), x, weights)
    expected = plain_rows(math, up, down, plain, x) * weights
    assert expected.std() > 0.01, "rows of nothing prove nothing"
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (128, 320), (2064, 64)], ids=str)
@pytest.mark.parametrize("name", FORMS)
@torch.inference_mode()
def test_bfloat16_products_are_within_their_bound(name: str, shape: tuple[int, int]) -> None:
    """Of the product in float64: of each weight 2 ** -7, of what is added up 2 ** -7 twice."""
    codes = random_codes(FORMS[name], shape, 4)
    codes = replace(codes, form=form_for(codes.form, torch.bfloat16))
    layout, flat = laid_out({"w": codes}, {})
    matrix, parts = layout.matrices[0], views(flat, layout)
    sizes = dequantise(
        replace(codes, zeros=None, form=replace(codes.form, zeros=False)), torch.float64
    ).abs()
    if codes.zeros is not None:
        zeros = replace(codes, codes=torch.full_like(codes.codes, 8 if "int4" in name else 0))
        sizes += dequantise(zeros, torch.float64).abs()
    weight = dequantise(codes, torch.float64)
    for tokens in (1, 2, 7, 33):
        x = torch.randn((tokens, shape[1]), generator=torch.Generator().manual_seed(5)).bfloat16()
        exact = x.double() @ weight.t()
        bound = 2**-7 * (x.double().abs() @ sizes.t()) + 2**-6 * exact.abs()
        for few_tokens in (0, 1000):
            actual = multiply(matrix, parts, x, few_tokens)
            assert actual.dtype == torch.bfloat16
            assert ((actual.double() - exact).abs() <= bound).all()
            assert exact.abs().max() > 8 * bound.min(), "a bound of everything proves nothing"


@torch.inference_mode()
def test_mxfp4_scales_of_any_size_keep_their_meaning() -> None:
    """Blocks of zeros have the smallest scale there is; large ones must not overflow either."""
    codes = random_codes(FORMS["mxfp4"], (16, 64), 6)
    scales = torch.full_like(codes.scales, 0.25)
    scales[0, 0], scales[1, 1], scales[2, 0] = 2.0**-127, 2.0**90, 2.0**-70
    codes.codes[3] = torch.arange(64) % 2 * 8  # nothing but zeros, of both signs
    codes = replace(codes, scales=scales)
    layout, flat = laid_out({"w": codes}, {})
    weight = multiply(layout.matrices[0], views(flat, layout), torch.eye(64).bfloat16()).t()
    exact = dequantise(codes, torch.float32)
    assert (weight.float()[4:] - exact[4:]).abs().max() < 1e-17
    assert (weight.float()[3]).abs().max() < 1e-17
    assert (weight.float() - exact).abs()[1, 32:].max() <= 2**-8 * exact[1, 32:].abs().max()
    assert (weight.float() - exact).abs()[[0, 2]].max() < 1e-16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMS)
@torch.inference_mode()
def test_a_card_reads_the_same_slot(name: str) -> None:
    codes = random_codes(FORMS[name], (128, 256), 7)
    layout, flat = laid_out({"w": codes}, {})
    matrix = layout.matrices[0]
    on_card = held(matrix, views(flat.cuda(), layout))
    assert torch.equal(on_card.codes.cpu().view(torch.uint8), codes.codes.view(torch.uint8))
    x = torch.randn((5, 256), generator=torch.Generator().manual_seed(8))
    exact = x @ dequantise(codes, torch.float32).t()
    actual = multiply(matrix, views(flat.cuda(), layout), x.cuda()).cpu()
    assert (actual - exact).abs().max() <= 1e-2 * exact.abs().max()
