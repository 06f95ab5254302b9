"""What every test shares: one torch thread, a data folder of its own, and its turn to run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.turns import turn

# Before torch is imported: its pools collapse when the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PRESCOPE_FAMILY_TABLE") == "1" and config.option.numprocesses:
        raise pytest.UsageError("the table of families is written by one process: leave out -n")


def is_worker() -> bool:
    """Say whether other processes run other tests of the same run."""
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device; torch is asked only if something needs one."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait for the other processes where a test has to; first of all, so that no clock runs yet."""
    if not is_worker():
        return (yield)
    folder = Path(item.config.option.basetemp).parent
    with turn(folder, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep everything away from the person's own data folder, which the launcher names."""
    os.environ["PRESCOPE_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", autouse=True)
def transients_once() -> Iterator[None]:
    """Run shapes through each model once: the suite loads the same few hundreds of times.

    What is remembered is only for loads; tests of the measurement call it themselves.
    """
    shape = sys.modules.get("runtime.adapter_shape")
    if shape is None:  # what was collected loads nothing
        yield
        return
    measured: dict[tuple[str, ...], Any] = {}
    measure = shape.transients_of

    def remembered(skeleton: Any, layers: Any) -> Any:
        formats = repr([(layer.name, layer.format) for layer in layers])
        model = (skeleton.config.to_json_string(use_diff=False), str(skeleton.dtype), formats)
        if model not in measured:
            measured[model] = measure(skeleton, layers)
        return measured[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "transients_of", remembered)
        yield


def pytest_sessionfinish() -> None:
    """Write the table of families and formats, if the environment asks for it."""
    if os.environ.get("PRESCOPE_FAMILY_TABLE") != "1":
        return
    from runtime.adapter import _NOT_OURS
    from tests.family_table import write_table

    write_table(_NOT_OURS)
