"""Our packing is torch's own, on every kind of CPU that torch has kernels for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.weight_packing import pack, unpack

ROWS = (16, 32, 48, 64, 96, 112, 128, 160, 208)


@pytest.mark.parametrize("rows", ROWS)
def test_packing_is_torchs_and_comes_back(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, 96), generator=generator).to(torch.uint8)
    packed = pack(codes)
    assert torch.equal(packed, torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_packing_of_other_cpus_is_learnt_as_well(capability: str) -> None:
    code = (
        f"from tests.test_weight_packing import *\n"
        f"for rows in {ROWS}: test_packing_is_torchs_and_comes_back(rows)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).resolve().parent.parent,
        check=True,
        timeout=120,
    )
