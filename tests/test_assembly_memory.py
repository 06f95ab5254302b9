"""A load that runs out of memory anywhere gives everything back, tries with less, and says so."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import executor_slots
from runtime.assembly import assemble
from runtime.core import Delta, LoadProgress, LoadRequest, Message, SamplingParams
from runtime.device_emulated import EmulatedDevice
from runtime.engine import Engine
from runtime.errors import MemoryPlanError
from runtime.store import ExpertStore

REQUEST = LoadRequest(policy="on-demand", cache_fraction=0.5)
Alloc = Callable[..., torch.Tensor]


class Allocations:
    """Counts what the load asks the device for and fails the chosen ones."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.failing: set[int] = set()
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        for name in ("allocate_slots", "allocate_host"):
            self._watch(patch, name)
        self._follow(patch, EmulatedDevice)
        self._follow(patch, ExpertStore)

    def _watch(self, patch: pytest.MonkeyPatch, name: str) -> None:
        real: Alloc = getattr(EmulatedDevice, name)

        def allocate(device: EmulatedDevice, *sizes: int) -> torch.Tensor:
            self.count += 1
            if self.count in self.failing:
                raise torch.OutOfMemoryError(f"no room for {sizes}")
            return real(device, *sizes)

        patch.setattr(EmulatedDevice, name, allocate)

    def _follow(self, patch: pytest.MonkeyPatch, kind: Any) -> None:
        opened, closed = kind.__init__, kind.close

        def init(one: Any, *args: Any, **kwargs: Any) -> None:
            opened(one, *args, **kwargs)
            self.opened.append(id(one))

        def close(one: Any) -> None:
            self.closed.append(id(one))
            closed(one)

        patch.setattr(kind, "__init__", init)
        patch.setattr(kind, "close", close)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    monkeypatch.setattr(executor_slots, "LEAST_BLOCK_BYTES", 1)
    monkeypatch.setattr(executor_slots, "BLOCKS", 3)
    return Allocations(monkeypatch)


def load(tmp_path: Path, seen: list[LoadProgress] | None = None) -> Engine:
    said = seen if seen is not None else []
    return assemble(REQUEST, progress=said.append, virtual_clock=True, data=tmp_path)


def parameters_alive() -> int:
    gc.collect()
    return sum(found.numel() for found in gc.get_objects() if type(found) is torch.nn.Parameter)


def tokens(engine: Engine) -> list[int]:
    params = SamplingParams(max_new_tokens=6)
    chunks = engine.generate("c", [Message("user", "Hello")], params)
    return [token for chunk in chunks if isinstance(chunk, Delta) for token in chunk.token_ids]


def test_failing_any_one_allocation_leads_to_a_smaller_engine_that_answers_the_same(
    allocations: Allocations, tmp_path: Path
) -> None:
    whole = load(tmp_path)
    expected, slots = tokens(whole), whole.parts.executor.slots
    assert not whole.remarks
    whole.close()
    total = allocations.count
    assert total >= 4  # blocks of slots, and the experts in RAM
    for k in range(1, total + 1):
        allocations.count, allocations.failing = 0, {k}
        allocations.opened.clear()
        allocations.closed.clear()
        seen: list[LoadProgress] = []
        engine = load(tmp_path, seen)
        assert engine.parts.executor.slots == slots * 75 // 100
        (remark,) = engine.remarks
        assert "no room" in remark
        assert f"{slots * 75 // 100} of 192" in remark
        assert f"instead of {slots} of 192" in remark
        assert any("Memory ran out; trying again" in step.text for step in seen)
        assert tokens(engine) == expected
        engine.close()
        assert set(allocations.opened) <= set(allocations.closed)


def test_the_cache_shrinks_first_and_the_context_last(
    allocations: Allocations, tmp_path: Path
) -> None:
    allocations.failing = {1, 2, 3}
    least = load(tmp_path)
    assert least.parts.plan.slots == 4
    assert least.parts.plan.kv_tokens == least.context_tokens == 1024
    assert "4,096" not in least.remarks[0].split("instead of")[0]
    assert len(tokens(least)) > 0
    least.close()


def test_when_nothing_helps_the_failure_names_the_numbers(
    allocations: Allocations, tmp_path: Path
) -> None:
    before = parameters_alive()
    allocations.failing = set(range(1, 1000))
    with pytest.raises(MemoryPlanError, match=r"even with \d+ of 192 experts.*no room") as failed:
        load(tmp_path)
    assert "VRAM limit" in failed.value.next_step
    assert allocations.count == 4  # one try of each plan, no more
    assert set(allocations.opened) <= set(allocations.closed)
    assert parameters_alive() <= before


def test_nothing_is_given_up_beside_another_engine(
    allocations: Allocations, tmp_path: Path
) -> None:
    allocations.failing = {1}
    with pytest.raises(MemoryPlanError):
        assemble(REQUEST, virtual_clock=True, data=tmp_path, beside=True)
    assert allocations.count == 1


def test_dense_weights_that_find_no_room_are_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch says so in different ways, and transformers passes some of them on as its own."""
    real = torch.empty
    left = [7]

    def scarce(*sizes: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return real(*sizes, **options)

    monkeypatch.setattr("runtime.loader_dense.torch.empty", scarce)
    engine = load(tmp_path)
    (remark,) = engine.remarks
    assert "can't allocate memory" in remark
    engine.close()


def test_experts_that_ram_has_no_room_for_stay_on_disk_and_the_load_says_so(
    tmp_path: Path,
) -> None:
    whole = load(tmp_path)
    expected = tokens(whole)
    whole.close()
    scarce = replace(REQUEST, ram_bytes=585_000_000)
    engine = assemble(scarce, virtual_clock=True, data=tmp_path)
    assert engine.parts.plan.ram_experts is not None
    assert any("read from the disk" in remark for remark in engine.remarks)
    assert tokens(engine) == expected
    engine.close()
    with pytest.raises(MemoryPlanError, match="PreScope Tiny needs at least"):
        assemble(replace(REQUEST, ram_bytes=500_000_000), virtual_clock=True, data=tmp_path)
    with pytest.raises(MemoryPlanError, match="disk"):
        assemble(scarce, virtual_clock=True, data=tmp_path, beside=True)
