"""The engine with experts on disk: what cannot be read ends its request, not the engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import planner
from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import Finished, LoadRequest, Message, SamplingParams
from runtime.errors import ModelFilesError

QUESTION = [Message("user", "What is 2 + 2?")]
FEW = SamplingParams(max_new_tokens=4)


def test_an_engine_lives_on_when_its_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    plan_memory = planner.plan_memory

    def small(*arguments: Any, **options: Any) -> Any:
        return replace(plan_memory(*arguments, **options), ram_experts=12)

    monkeypatch.setattr(planner, "plan_memory", small)
    engine = assemble(LoadRequest(str(folder)), data=tmp_path)
    try:
        chunks = list(engine.generate("a", QUESTION, FEW))
        assert isinstance(chunks[-1], Finished)
        stats = chunks[-1].stats
        assert stats.ram_experts == 12
        assert stats.disk_bytes > 0
        assert 0 < stats.disk_stall_s <= stats.stall_s
        assert stats.ram_hit_rate is not None
        assert 0 < stats.ram_hit_rate < 1
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        with weights.open("r+b") as file:
            file.truncate(len(whole) // 2)
        for conversation in ("b", "c"):
            with pytest.raises(ModelFilesError, match=r"model\.safetensors"):
                list(engine.generate(conversation, QUESTION, FEW))
        assert engine.answering == 0
        assert engine.device_works()
    finally:
        engine.close()
