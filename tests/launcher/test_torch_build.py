from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from assets.launcher import gpu
from assets.launcher.download import Wheel
from assets.launcher.gpu import Gpu
from assets.launcher.torch_build import PYTORCH_INDEX, bytes_to_fetch, suitable

NEW = Gpu("RTX 4090", (13, 0), (8, 9))
OLD_DRIVER = Gpu("RTX 4090", (12, 4), (8, 9))
OLD_CARD = Gpu("GTX 1080", (13, 0), (6, 1))
ANCIENT = Gpu("GTX 780", (11, 4), (3, 5))

CPU, CU126, CU130 = (PYTORCH_INDEX + name for name in ("cpu", "cu126", "cu130"))


@pytest.mark.parametrize(
    ("card", "system", "indexes"),
    [
        (None, "Linux", [CPU, None]),
        (None, "Windows", [None]),
        (None, "Darwin", [None]),
        (NEW, "Linux", [None, CPU]),
        (NEW, "Windows", [CU130, None]),
        (OLD_DRIVER, "Linux", [CU126, CPU]),
        (OLD_CARD, "Linux", [CU126, CPU]),
        (OLD_CARD, "Windows", [CU126, None]),
        (ANCIENT, "Linux", [CPU, None]),
        (ANCIENT, "Windows", [None]),
    ],
)
def test_driver_and_card_choose_the_build(
    card: Gpu | None, system: str, indexes: list[str | None]
) -> None:
    assert [build.index for build in suitable(card, system)] == indexes


def test_the_variable_overrides_the_card() -> None:
    assert suitable(NEW, "Linux", "cpu")[0].index == CPU
    assert suitable(None, "Windows", " CU126 ")[0].index == CU126
    assert [build.index for build in suitable(NEW, "Windows", "configured")] == [None]


def test_pytorchs_builds_are_pinned_by_name_so_that_no_other_index_can_offer_its_own() -> None:
    assert suitable(None, "Linux")[0].pin_suffix == "+cpu"
    assert suitable(NEW, "Windows")[0].pin_suffix == "+cu130"


def test_what_is_here_already_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"x" * 70)
    (tmp_path / "b.whl.part").write_bytes(b"x" * 30)
    wheels = [Wheel(n, "1", f"https://host/{n}.whl", "", 100) for n in ("a", "b", "c")]
    wheels.append(Wheel("d", "1", "file:///wheels/d.whl", "", 1000))
    assert bytes_to_fetch(wheels, tmp_path) == 70 + 100


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("import time; time.sleep(30)", None),
        ("import os; os.abort()", None),
        ("print('not json')", None),
        ("print('null')", None),
        (
            'print(\'{"name": "X", "driver_cuda": [13, 0], "capability": [8, 9]}\')',
            Gpu("X", (13, 0), (8, 9)),
        ),
    ],
)
def test_a_driver_that_hangs_or_crashes_counts_as_none(
    script: str, found: Gpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "probe.py"
    stand_in.write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(stand_in))
    assert gpu.probe(timeout_s=1.0) == found


def test_the_probe_itself_runs_here_and_prints_json() -> None:
    done = subprocess.run([sys.executable, gpu.__file__], capture_output=True, check=True)
    assert done.stdout.strip() == b"null" or b'"capability"' in done.stdout


FAKE_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device ? "Better Card" : "Old Card", size);
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? (device ? 8 : 6) : (device ? 9 : 1);
  return 0;
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler")
def test_the_driver_is_asked_in_its_own_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "driver.c"
    source.write_text(FAKE_DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    card = gpu.probe()
    assert card == Gpu("Better Card", (12, 6), (8, 9))
    assert suitable(card, "Linux")[0].index == CU126
