"""What every test shares: one torch thread, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os

import pytest

# Before torch is imported: its pools collapse when the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device; torch is asked only if something needs one."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_sessionfinish() -> None:
    """Write the table of families and formats, if the environment asks for it."""
    if os.environ.get("PRESCOPE_FAMILY_TABLE") != "1":
        return
    from runtime.adapter import _NOT_OURS
    from tests.family_table import write_table

    write_table(_NOT_OURS)
