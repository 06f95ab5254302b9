"""Our packing is torch's own, on every kind of CPU that torch has kernels for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.weight_packing import pack_eights, pack_into, unpack

ROWS = (16, 32, 48, 64, 96, 112, 128, 160, 208)


COLUMNS = (32, 96, 160, 544)


def pack(
    numbers: Tensor, shape: tuple[int, int], apart: int, planes: int = 1, signed: bool = False
) -> list[Tensor]:
    packed = [torch.zeros((shape[0], shape[1] // 2), dtype=torch.uint8) for _ in range(planes)]
    pack_into(numbers.numpy(), [plane.view(-1).numpy() for plane in packed], apart, signed)
    return packed


def torchs(codes: Tensor) -> Tensor:
    packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_packing_is_torchs_and_comes_back(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shape = rows, columns
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    (packed,) = pack(codes, shape, 0)
    assert torch.equal(packed, torchs(codes))
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_numbers_are_packed_as_they_lie_in_files(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shape = rows, columns
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    expected = torchs(codes)
    neighbours = codes[:, ::2] | codes[:, 1::2] << 4
    assert torch.equal(pack(neighbours, shape, 1)[0], expected)
    words = neighbours.view(torch.int32)
    assert torch.equal(pack(words, shape, 1)[0], expected)
    assert torch.equal(pack(words.t().contiguous().t(), shape, 1)[0], expected)
    # Runs with something in between, as in GGUF blocks, at odd addresses and even ones.
    for apart, per_run, header in ((16, 32, 2), (16, 32, 1), (32, 64, 16)):
        if columns % per_run:
            continue
        runs = codes.view(rows, -1, 2, apart)
        whole = torch.randint(0, 256, (rows, columns // per_run, header + apart), dtype=torch.uint8)
        whole[:, :, header:] = runs[:, :, 0] | runs[:, :, 1] << 4
        assert torch.equal(pack(whole[:, :, header:], shape, apart)[0], expected)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_eight_bits_are_packed_into_two_planes(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shape = rows, columns
    whole = torch.randint(-128, 128, (rows, columns // 32, 34), generator=generator)
    numbers = whole.to(torch.int8)[:, :, 2:]
    low, high = pack(numbers, shape, 0, 2, signed=True)
    digits = numbers.flatten(1).to(torch.int16) + 128
    assert torch.equal(low, torchs(digits & 15))
    assert torch.equal(high, torchs(digits >> 4))
    assert torch.equal(pack(numbers.flatten(1), shape, 0, 2, signed=True)[1], high)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_words_of_eight_rows_are_packed_as_awq_has_them(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    words = torch.zeros((rows // 8, columns), dtype=torch.int64)
    for row, place in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        words |= codes[row::8] << (4 * place)
    packed = torch.zeros((rows, columns // 2), dtype=torch.uint8)
    pack_eights(words.to(torch.int32).numpy(), packed.view(-1).numpy())
    assert torch.equal(packed, torchs(codes))


def test_what_does_not_fit_its_place_is_refused() -> None:
    words = np.zeros((2, 32), np.int32)
    with pytest.raises(ValueError, match="do not fit"):
        pack_eights(words, np.zeros(16 * 16 - 1, np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        pack_into(np.zeros((16, 16), np.uint8), [np.zeros(16 * 16 + 1, np.uint8)], 1)
    with pytest.raises(ValueError, match="do not fit"):
        pack_into(np.zeros((24, 16), np.uint8), [np.zeros(24 * 16, np.uint8)], 1)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_packing_of_other_cpus_is_learnt_as_well(capability: str) -> None:
    code = (
        f"from tests.test_weight_packing import *\n"
        f"for rows in {ROWS}:\n"
        f"  for columns in {COLUMNS}:\n"
        f"    test_packing_is_torchs_and_comes_back(rows, columns)\n"
        f"    test_numbers_are_packed_as_they_lie_in_files(rows, columns)\n"
        f"    test_eight_bits_are_packed_into_two_planes(rows, columns)\n"
        f"    test_words_of_eight_rows_are_packed_as_awq_has_them(rows, columns)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).resolve().parent.parent,
        check=True,
        timeout=120,
    )
