"""Quantised experts end to end: the command line twice over, and RAM that holds only a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.__main__ import main
from runtime.core import ExpertId
from runtime.expert_file_header import FOLDER, kept_files
from tests.checkpoints import load
from tests.families import make_checkpoint


def chat(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    arguments = ["chat", "default", "What is a cache?", "--virtual-clock", "--json"]
    assert main([*arguments, "--max-new-tokens", "12", *options]) == 0
    answer: dict[str, Any] = json.loads(capfd.readouterr().out)
    return answer


def test_the_second_chat_reads_what_the_first_kept_and_says_the_same(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--experts", "int4", "--data-dir", str(tmp_path))
    first = chat(capfd, *options)
    (kept,) = kept_files(tmp_path / FOLDER)
    assert (kept.model, kept.kind, kept.finished) == ("PreScope Tiny", "int4", True)
    written_ns = kept.path.stat().st_mtime_ns
    second = chat(capfd, *options)
    assert kept.path.stat().st_mtime_ns == written_ns
    assert second["token_ids"] == first["token_ids"]
    assert first["remarks"] == second["remarks"] == []
    assert first["text"]
    raw = bytearray(kept.path.read_bytes())
    raw[-5000] ^= 1
    kept.path.write_bytes(raw)
    third = chat(capfd, *options)
    assert third["token_ids"] == first["token_ids"]
    assert len(third["remarks"]) == 1
    assert "damaged" in third["remarks"][0]
    raw[-5000] ^= 1
    assert kept.path.read_bytes() == raw


@pytest.mark.parametrize("keeping", [True, False])
def test_experts_that_ram_does_not_hold_come_from_the_kept_file(
    keeping: bool, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "model")
    whole = load(tmp_path / "model", experts="int4")
    kept = tmp_path / "kept" if keeping else None
    part = load(tmp_path / "model", experts="int4", kept=kept, ram_experts=3)
    for layer, experts in enumerate(whole.shape.experts):
        for expert in range(experts):
            at = ExpertId(layer, expert)
            part.store.fill(at, 0)
            size = whole.store.format_of(layer).size_bytes
            memory = part.store._blocks.memory(0)[:size]
            assert torch.equal(memory, whole.store.bytes_of(at))
    assert bool(part.remarks) != keeping
    if kept is None:
        assert "that is slow" in part.remarks[0]
    else:
        assert [file.finished for file in kept_files(kept)] == [True]
    part.store.close()
    whole.store.close()
