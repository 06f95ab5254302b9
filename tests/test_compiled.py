"""What is kept of compiled loops may be damaged, and a disk may be full: neither is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LOOP = """
from runtime.compiled import compiled

@compiled
def total(numbers):
    found = 0.0
    for number in numbers:
        found += number
    return found
"""

RUN = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "full disk":
    from numba.core import caching
    def full(*_):
        raise OSError(28, "No space left on device")
    caching.IndexDataCacheFile._save_data = caching.IndexDataCacheFile._save_index = full
import loop
assert loop.total(np.arange(5.0)) == 10.0
print(sum(loop.total.stats.cache_hits.values()))
"""


def hits(folder: Path, how: str = "") -> int:
    """Return how many versions a process of its own found kept, after it ran the loop."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), how],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept")},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return int(ran.stdout)


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_damaged_file_is_made_anew(ending: str, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    assert hits(tmp_path) == 0
    assert hits(tmp_path) == 1
    (file,) = (tmp_path / "kept").rglob(f"*{ending}")
    for damaged in (b"", file.read_bytes()[:40], b"\x80\x05not a pickle"):
        file.write_bytes(damaged)
        assert hits(tmp_path) == 0
        assert hits(tmp_path) == 1


def test_a_full_disk_keeps_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    assert hits(tmp_path, "full disk") == 0
    assert not [*(tmp_path / "kept").rglob("*.nb*")]
