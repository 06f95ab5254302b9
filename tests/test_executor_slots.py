"""Slots given back are memory given back, and the answer does not change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime import executor_slots
from runtime.assembly import assemble
from runtime.core import Delta, LoadRequest, Message, SamplingParams
from runtime.device_emulated import EmulatedDevice
from runtime.engine import Engine
from runtime.executor import Executor
from runtime.executor_slots import SlotBlocks
from tests.machines import emulated_profile

SLOT = 64


def blocks_of(slots: int, least_bytes: int, patch: pytest.MonkeyPatch) -> SlotBlocks:
    patch.setattr(executor_slots, "LEAST_BLOCK_BYTES", least_bytes)
    return SlotBlocks(EmulatedDevice(emulated_profile(), virtual_clock=True), slots, SLOT)


def test_every_slot_has_bytes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = blocks_of(100, SLOT * 3, monkeypatch)
    for slot in range(100):
        slab[slot, slice(None)].fill_(slot)
    assert all(int(slab[slot, slice(5, 6)][0]) == slot for slot in range(100))
    assert slab[7, slice(10, 20)].shape == (10,)
    assert slab.slots == 100


def test_keeping_fewer_gives_whole_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = blocks_of(100, SLOT, monkeypatch)  # sixteen blocks of seven
    gone = weakref.ref(slab._blocks[-1])
    assert slab.keep(71) == 77
    assert gone() is None
    assert slab.keep(200) == slab.slots == 77
    assert slab.keep(0) == 0


def test_small_slots_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(blocks_of(100, SLOT * 60, monkeypatch)._blocks) == 2
    assert len(blocks_of(0, SLOT, monkeypatch)._blocks) == 0


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(executor_slots, "LEAST_BLOCK_BYTES", 1)
    request = LoadRequest(policy="hybrid", cache_fraction=0.5)
    made = assemble(request, virtual_clock=True, data=tmp_path)
    yield made
    made.close()


def tokens(engine: Engine, name: str) -> list[int]:
    params = SamplingParams(max_new_tokens=12)
    chunks = engine.generate(name, [Message("user", "What is 3 + 4?")], params)
    return [token for chunk in chunks if isinstance(chunk, Delta) for token in chunk.token_ids]


def test_an_engine_that_shrinks_gives_memory_back_and_answers_the_same(engine: Engine) -> None:
    executor = engine.parts.executor
    assert isinstance(executor, Executor)
    expected, whole = tokens(engine, "a"), executor.slots
    last = weakref.ref(executor._slab._blocks[-1].untyped_storage())
    gc.collect()
    assert last() is not None
    assert executor.shrink()
    gc.collect()
    assert last() is None
    assert executor.slots == whole * 3 // 4
    assert executor._slab.slots < whole
    assert tokens(engine, "b") == expected
    executor.residency.cache.check()
    executor.resize(whole)  # what was given back cannot be used again
    assert executor.slots == executor._slab.slots
    assert tokens(engine, "c") == expected
    counts = executor.counters()
    assert counts.link_bytes_issued > 0


def test_shrinking_ends_at_what_a_layer_needs(engine: Engine) -> None:
    executor = engine.parts.executor
    assert isinstance(executor, Executor)
    shrinks = 0
    while executor.shrink():
        shrinks += 1
        assert shrinks < 30
    assert executor.slots == engine.parts.shape.top_k
    assert tokens(engine, "d")


def test_memory_that_runs_out_while_answering_costs_slots_and_not_the_answer(
    engine: Engine,
) -> None:
    executor = engine.parts.executor
    expected, whole = tokens(engine, "a"), executor.slots
    engine.forget()
    honest, calls = engine._passes.meeting._run_together, 0

    def tight(layer: int, parts: object) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if executor.slots == whole and calls > 20:
            raise torch.OutOfMemoryError("1 GiB more is needed")
        return honest(layer, parts)  # type: ignore[arg-type]

    engine._passes.meeting._run_together = tight
    assert not engine.remarks
    assert tokens(engine, "e") == expected
    assert executor.slots == whole * 3 // 4
    assert engine.remarks == (
        f"Memory ran out while answering: {executor.slots} expert slots are left.",
    )
