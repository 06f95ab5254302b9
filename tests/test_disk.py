"""Reads past the page cache return the file's bytes, leave the cache alone, and can be timed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import disk_probe
from runtime.core import Reading
from runtime.disk_direct import BOUNCE_BYTES, DirectFile, DirectFiles, is_cached
from runtime.disk_probe import with_disk
from runtime.profiles import Memory, cpu_profile
from tests.machines import emulated_profile

SIZE = 3 * BOUNCE_BYTES + 12345


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("disk") / "weights.gguf"
    found.write_bytes(np.random.default_rng(0).bytes(SIZE))
    with found.open("rb") as file:
        os.fsync(file.fileno())
    return found


def read(file: DirectFile, at: int, size: int) -> bytes:
    buffer = bytearray(size)
    done = 0
    while done < size:
        count = file.read_at([memoryview(buffer)[done:]], at + done)
        if not count:
            break
        done += count
    return bytes(buffer[:done])


@pytest.mark.parametrize("direct", [True, False])
def test_any_range_comes_back_as_it_is_in_the_file(
    path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr("runtime.disk_direct.sys.platform", "elsewhere")
    whole = path.read_bytes()
    with path.open("rb", buffering=0) as raw:
        file = DirectFile(raw.fileno())
        assert file.direct or not direct or not hasattr(os, "O_DIRECT")
        for at, size in [(0, 1), (1, 4096), (4095, 2), (777, BOUNCE_BYTES), (5, SIZE), (SIZE, 9)]:
            assert read(file, at, size) == whole[at : at + size], (at, size)
        file.close()
        file.close()


def test_a_file_system_that_refuses_direct_reads_is_read_ordinarily(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, "preadv", None)
    whole = path.read_bytes()
    with path.open("rb", buffering=0) as raw:
        file = DirectFile(raw.fileno())
        begun_direct = file.direct
        if not begun_direct:
            pytest.skip("no direct reads here")

        def refusing(fileno: int, *arguments: Any) -> Any:
            if fileno != raw.fileno():
                raise OSError(code, os.strerror(code))
            assert real is not None
            return real(fileno, *arguments)

        monkeypatch.setattr(os, "preadv", refusing)
        code = errno.EIO
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            read(file, 5, 9000)
        code = errno.EINVAL
        assert read(file, 5, 9000) == whole[5:9005]
        assert not file.direct
        assert read(file, 0, SIZE) == whole
        file.close()


def test_a_file_that_is_not_what_it_was_is_not_read(tmp_path: Path) -> None:
    changed = tmp_path / "weights"
    changed.write_bytes(b"a" * 9000)
    with changed.open("rb", buffering=0) as raw:
        files = DirectFiles([raw])
        assert files.read_at(0, [memoryview(bytearray(10))], 8995) == 5
        with changed.open("r+b") as other:
            other.truncate(100)
        with pytest.raises(ValueError, match="changed"):
            files.read_at(0, [memoryview(bytearray(10))], 0)
        files.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system cannot tell")
def test_reading_past_the_cache_leaves_it_cold(path: Path) -> None:
    with path.open("rb", buffering=0) as raw:
        raw.read()
        assert is_cached(raw)
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file = DirectFile(raw.fileno())
        assert len(read(file, 0, SIZE)) == SIZE
        file.close()
        assert not is_cached(raw)


def test_the_disk_is_measured_on_the_models_own_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile: Any = cpu_profile("CPU", Memory(8, 4))
    assert profile.disk_bytes_per_s.source == "assumed"
    assert with_disk(profile, path) is profile, "too small to say anything"
    monkeypatch.setattr(disk_probe, "LEAST_FILE_BYTES", 2**20)
    monkeypatch.setattr(disk_probe, "MEASURE_S", 0.05)
    monkeypatch.setattr(disk_probe, "BOUNCE_BYTES", 2**18)
    emulated = emulated_profile()
    assert with_disk(emulated, path) is emulated
    assert with_disk(profile, path.with_name("gone")) is profile
    found = with_disk(profile, path.parent)
    if hasattr(os, "O_DIRECT"):
        assert found.disk_bytes_per_s.source == found.disk_call_s.source == "measured"
        assert 1e6 < found.disk_bytes_per_s.value < 1e12
        assert 0 < found.disk_call_s.value < 10
    monkeypatch.setattr(disk_probe, "_PLAUSIBLE", (1e15, 1e16))
    assert with_disk(profile, path).disk_bytes_per_s == Reading(2e9, "assumed")
