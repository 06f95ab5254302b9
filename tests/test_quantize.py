"""Quantising plain matrices: close, no worse than the plain recipe, and in forms that are held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.formats import Form
from runtime.kernels import views
from runtime.kernels_quantised import has_packed_op
from runtime.quantize import form_of, quantise
from runtime.weight_forms import Codes, dequantise, held
from tests import unpacking_reference
from tests.weight_codes import laid_out

EXACT = [
    Form("int8"),
    Form("int8", 1, 64, scale_dtype="bfloat16"),
    Form("int8", 1, 32, zeros=True),
    Form("int4", 1, 16),
    Form("int4", 1, 32, zeros=True, scale_dtype="bfloat16"),
    Form("int4", 1, 64, zeros=True, scale_dtype="bfloat16"),
    Form("int4", 1, 64, zeros=True),
    Form("int4", 1, 128, zeros=True, scale_dtype="bfloat16"),
]
SHAPES = [(16, 64), (96, 320), (40, 96), (64, 2048), (3, 128)]


def drawn(shape: tuple[int, int], seed: int = 1) -> Tensor:
    """Weights with heavy tails and an offset of its own per row, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator) * 0.02
    tails = 1 + 2 * torch.rand(shape, generator=generator) ** 8
    return plain * tails + 0.005 * torch.randn((shape[0], 1), generator=generator)


def by_range(matrix: Tensor, form: Form) -> Codes:
    """The plain recipe: evenly from the smallest to the largest number of a group."""
    groups = matrix.unflatten(1, (-1, form.columns))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15)
    zeros = (low + 8 * scale).squeeze(2)
    return Codes(form, codes.flatten(1).to(torch.uint8), scale.squeeze(2), zeros)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_numbers_are_as_near_as_their_scale_allows(kind: str, shape: tuple[int, int]) -> None:
    matrix = drawn(shape)
    form = form_of(kind, shape)  # type: ignore[arg-type]
    assert form is not None
    codes = quantise(matrix, form)
    error = (dequantise(codes, torch.float32) - matrix).abs()
    width = form.columns or shape[1]
    steps = codes.scales.repeat_interleave(width, 1)
    if kind == "int8":
        assert (error <= 0.501 * steps).all()
    else:
        # The fit may leave the outermost number outside: never by more than one step.
        assert (error <= 1.5 * steps).all()
        assert (error <= 0.501 * steps).float().mean() > 0.97
    layout, flat = laid_out({"w": codes}, {})
    back = held(layout.matrices[0], views(flat, layout))
    assert torch.equal(back.scales, codes.scales), "scales are chosen as they are held"
    assert torch.equal(dequantise(back, torch.float32), dequantise(codes, torch.float32))


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_four_bits_are_nearer_than_the_plain_recipe(columns: int) -> None:
    matrix = drawn((64, 1024))
    form = Form("int4", 1, columns, zeros=True, scale_dtype="bfloat16")
    errors = [
        (dequantise(codes, torch.float32) - matrix).square().sum().item()
        for codes in (quantise(matrix, form), by_range(matrix, replace(form)))
    ]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_quantised_as_their_float32(dtype: torch.dtype) -> None:
    matrix = drawn((16, 128)).to(dtype)
    form = form_of("int4", (16, 128))
    assert form is not None
    ours, wide = quantise(matrix, form), quantise(matrix.float(), form)
    assert torch.equal(ours.codes, wide.codes)
    assert torch.equal(ours.scales, wide.scales)


@pytest.mark.parametrize("value", [0.0, 0.7, -3e-5])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_constant_matrix_stays_one(kind: str, value: float) -> None:
    matrix = torch.full((16, 64), value)
    form = form_of(kind, (16, 64))  # type: ignore[arg-type]
    assert form is not None
    back = dequantise(quantise(matrix, form), torch.float32)
    assert torch.isfinite(back).all()
    assert (back - value).abs().max() <= 2**-8 * abs(value)


def test_what_no_group_divides_falls_back_by_name() -> None:
    assert form_of("int4", (64, 192)) == Form("int4", 1, 64, True, "bfloat16")
    assert form_of("int4", (64, 96)) == Form("int4", 1, 32, True, "bfloat16")
    assert form_of("int4", (64, 48)) == Form("int8")
    assert form_of("int8", (64, 48)) == Form("int8")
    assert form_of("int8", (64, 50)) is None
    assert form_of("int4", (64, 50)) is None


@pytest.mark.parametrize("shape", [(64, 2048), (128, 96), (32, 16)], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_every_form_has_a_fast_product(kind: str, shape: tuple[int, int]) -> None:
    form = form_of(kind, shape)  # type: ignore[arg-type]
    assert form is not None
    layout, _ = laid_out({"w": quantise(drawn(shape), form)}, {})
    assert has_packed_op(layout.matrices[0], torch.bfloat16)


@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 1e34], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", EXACT, ids=str)
def test_numbers_are_bit_by_bit_those_of_the_reference(
    form: Form, dtype: torch.dtype, size: float
) -> None:
    matrix = drawn((67, 1024)) * 50 * size
    matrix[3], matrix[4, :64], matrix[5, :5] = 0.0, 0.7 * size, -0.0
    matrix[6], matrix[7] = matrix[6].abs(), -matrix[7].abs()
    matrix = matrix.to(dtype).nan_to_num()
    for each in (matrix, matrix.t().contiguous().t(), matrix[:1]):
        ours = quantise(each, form)
        # torch would add up in another order where inputs do not lie side by side.
        theirs = unpacking_reference.quantise(each.contiguous(), form)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales.view(torch.int32), theirs.scales.view(torch.int32))
        if ours.zeros is not None and theirs.zeros is not None:
            assert torch.equal(ours.zeros.view(torch.int32), theirs.zeros.view(torch.int32))


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("form", EXACT, ids=str)
def test_groups_with_what_is_not_finite_show_it_in_their_scale(form: Form, number: float) -> None:
    matrix = drawn((5, 1024))
    matrix[2, 700] = number
    matrix[3, 0], matrix[3, 1] = number, -number
    ours, theirs = quantise(matrix, form), unpacking_reference.quantise(matrix, form)
    assert torch.equal(ours.scales.isfinite(), theirs.scales.isfinite())
    assert not ours.scales.isfinite().all()
