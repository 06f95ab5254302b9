"""Switching models in the real engine process: another folder, a damaged one, and back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.client import LocalEngine
from runtime.core import (
    Delta,
    EmulatedMachine,
    EngineStatus,
    Finished,
    GenerationStats,
    LoadRequest,
    Message,
    SamplingParams,
)

DEFAULT = Path(__file__).resolve().parent.parent / "assets" / "default_model"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    client = LocalEngine(tmp_path_factory.mktemp("engine"))
    yield client
    client.close()


def wait(engine: LocalEngine, done: Callable[[EngineStatus], bool]) -> EngineStatus:
    deadline = time.monotonic() + 90
    while not done(engine.status()):
        assert time.monotonic() < deadline, engine.status()
        time.sleep(0.05)
    return engine.status()


def ask(engine: LocalEngine) -> tuple[str, GenerationStats]:
    params = SamplingParams(max_new_tokens=24)
    chunks = list(engine.generate("chat", [Message("user", "Hello!")], params))
    text = "".join(chunk.text for chunk in chunks if isinstance(chunk, Delta))
    last = chunks[-1]
    assert isinstance(last, Finished)
    return text, last.stats


def test_the_models_on_this_disk_take_turns_and_a_damaged_one_changes_nothing(
    engine: LocalEngine, tmp_path: Path
) -> None:
    engine.load(LoadRequest())
    wait(engine, lambda status: status.state == "ready")
    text, stats = ask(engine)
    assert text
    assert stats.emulated
    assert stats.served_cpu < stats.routed

    other = tmp_path / "another-model"
    shutil.copytree(DEFAULT, other)
    engine.load(LoadRequest(str(other)))
    wait(engine, lambda status: status.model == "another-model")
    text, stats = ask(engine)
    assert text
    assert not stats.emulated
    assert stats.policy == "cpu-only"
    assert stats.served_cpu == stats.routed > 0
    assert stats.link_bytes_on_demand == 0

    damaged = tmp_path / "damaged-model"
    shutil.copytree(DEFAULT, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    engine.load(LoadRequest(str(damaged)))
    status = wait(engine, lambda status: bool(status.notice))
    assert "model.safetensors" in status.notice
    assert status.model == "another-model"
    assert status.state == "ready"
    assert ask(engine)[0] == text

    engine.load(LoadRequest(emulated=EmulatedMachine(link_bytes_per_s=7e6)))
    wait(engine, lambda status: status.state == "ready" and status.model != "another-model")
    assert ask(engine)[1].emulated
    snapshot = engine.snapshot()
    assert snapshot is not None
    assert snapshot.link_max_bytes_per_s == 7e6, "the person's own numbers are the machine's"
