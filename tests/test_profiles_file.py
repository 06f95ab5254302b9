"""The card's profile comes back as it was probed, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.core import HardwareProfile
from runtime.machines import MACHINES
from runtime.profiles_file import FILE_NAME, keep_profile, kept_profile

GIB = 2**30
PROFILE: HardwareProfile = replace(
    MACHINES["rtx4090"].profile(),
    device_kind="cuda",
    vram_free_bytes=3 * GIB,
    ram_free_bytes=20 * GIB,
    pinnable_bytes=7 * GIB,
)


def test_a_card_comes_back_with_its_memory_as_without_a_model(tmp_path: Path) -> None:
    keep_profile(PROFILE, tmp_path)
    found = kept_profile(tmp_path)
    assert found is not None
    assert (found.vram_free_bytes, found.ram_free_bytes) == (int(22.5 * GIB), 60 * GIB)
    assert replace(found, vram_free_bytes=3 * GIB, ram_free_bytes=20 * GIB) == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("kind", ["cpu", "emulated"])
def test_only_a_card_is_kept(tmp_path: Path, kind: str) -> None:
    keep_profile(replace(PROFILE, device_kind=kind), tmp_path)
    assert kept_profile(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    keep_profile(PROFILE, tmp_path / "missing")
    assert kept_profile(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"vram_total_bytes": -1},
        {"vram_total_bytes": "24"},
        {"link_bytes_per_s": 5},
        {"link_bytes_per_s": {"value": 0, "source": "measured"}},
        {"link_bytes_per_s": {"value": 1}},
        {"device_kind": "cpu"},
        {"unknown": 1},
    ],
)
def test_a_file_that_makes_no_sense_is_not_believed(
    tmp_path: Path, change: dict[str, object]
) -> None:
    keep_profile(PROFILE, tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert kept_profile(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_damaged_file_is_not_believed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert kept_profile(tmp_path) is None
