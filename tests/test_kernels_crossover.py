"""Where packed products stop paying: measured once, kept, and never believed blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.formats import ExpertFormat, Form, Matrix, lay_out
from runtime.kernels_crossover import (
    FILE,
    LADDER,
    Crossovers,
    assumed_few_tokens,
    measured_few_tokens,
)
from runtime.kernels_quantised import FEW_TOKENS
from runtime.weight_forms import parts_of


def layout_of(form: Form, *shapes: tuple[int, int]) -> ExpertFormat:
    matrices = [Matrix(f"w{number}", shape, form) for number, shape in enumerate(shapes)]
    return lay_out([part for matrix in matrices for part in parts_of(matrix)], matrices)


class Asked:
    """Stands for a measurement and remembers for what it was asked."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.matrices: list[Matrix] = []

    def __call__(self, matrix: Matrix) -> int:
        self.matrices.append(matrix)
        return self.answer


INT4 = Form("int4", 1, 64, zeros=True, scale_dtype="bfloat16")


def test_it_is_measured_once_for_the_largest_matrix_and_kept(tmp_path: Path) -> None:
    layout = layout_of(INT4, (64, 128), (256, 128))
    first, second = Asked(16), Asked(99)
    assert Crossovers(tmp_path, first).few_tokens(layout) == 16
    assert [matrix.shape for matrix in first.matrices] == [(256, 128)]
    assert Crossovers(tmp_path, second).few_tokens(layout) == 16
    assert second.matrices == []
    assert Crossovers(tmp_path, second).few_tokens(layout_of(INT4, (64, 64))) == 99


@pytest.mark.parametrize("form", [Form("fp8"), Form("mxfp4", 1, 32), Form("int4")])
def test_matrices_without_a_packed_product_are_not_measured(tmp_path: Path, form: Form) -> None:
    asked = Asked(3)
    assert Crossovers(tmp_path, asked).few_tokens(layout_of(form, (64, 132))) == FEW_TOKENS
    assert asked.matrices == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"x": "y"}', '{"KEY": -1}', '{"KEY": 1e9}', ""])
def test_a_damaged_file_is_measured_again(tmp_path: Path, text: str) -> None:
    layout = layout_of(INT4, (64, 128))
    Crossovers(tmp_path, Asked(4)).few_tokens(layout)
    (key,) = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(text.replace("KEY", key))
    asked = Asked(8)
    assert Crossovers(tmp_path, asked).few_tokens(layout) == 8
    assert len(asked.matrices) == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    crossovers = Crossovers(tmp_path / "file", Asked(4))
    assert crossovers.few_tokens(layout_of(INT4, (64, 128))) == 4


@pytest.mark.parametrize("form", [INT4, Form("fp8", 128, 128), Form("mxfp4", 1, 32)])
def test_a_measurement_is_a_step_of_the_ladder(form: Form) -> None:
    assert measured_few_tokens(layout_of(form, (256, 512)).matrices[0]) in (0, *LADDER)


def test_what_may_not_be_measured_is_assumed() -> None:
    assert assumed_few_tokens(layout_of(INT4, (64, 128))) == FEW_TOKENS
