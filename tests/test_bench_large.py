"""`bench large` on a checkpoint that is not large: every case runs, and the tiers agree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from runtime.bench import large, large_files


@pytest.mark.timeout(300)  # five processes, one after the other
def test_every_case_runs_and_gives_the_tokens_of_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"HIDDEN": 128, "INNER": 64, "EXPERTS": 32, "TOP_K": 2, "VOCABULARY": 8192}
    small |= {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "CONTEXT_TOKENS": 256}
    for name, value in small.items():
        monkeypatch.setattr(large_files, name, value)
    monkeypatch.setenv("PRESCOPE_DATA_DIR", str(tmp_path / "data"))
    options = argparse.Namespace(layers=2, folder=str(tmp_path / "model"))
    said: list[str] = []
    result = large.run(options, said.append)
    assert [case["case"] for case in result["cases"]] == [case.name for case in large.CASES]
    for case, asked in zip(result["cases"], large.CASES, strict=True):
        assert case["same_tokens_as_in_ram"] is not False, case
        on_disk = asked.ram_share is not None
        assert (case["ram_share"] < 1) == on_disk
        assert (case["disk_bytes_per_token"] > 0) == on_disk
    text = large.tell(result)
    assert "OTHERS" not in text
    assert all(case.name in text for case in large.CASES)
    json.dumps(result, allow_nan=False)


def test_a_checkpoint_that_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HIDDEN": 64, "INNER": 32, "EXPERTS": 4, "VOCABULARY": 4096}.items():
        monkeypatch.setattr(large_files, name, value)
    large_files.write_checkpoint(tmp_path, 1, lambda text: None)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    large_files.write_checkpoint(tmp_path, 1, lambda text: None)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.errors import ConfigError

    with pytest.raises(ConfigError, match="GB are free"):
        large_files.write_checkpoint(tmp_path, 10_000, lambda text: None)
    assert not list(tmp_path.iterdir())
