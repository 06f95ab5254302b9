"""Experts on disk, in RAM and in slots: the same bits come out, wherever they came from.

The threads run in real time here, and a place in RAM is poisoned before every read, so that bytes
which are read too early or too late show.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import POLICIES, ExpertId, PolicyName
from runtime.device_emulated import EmulatedDevice
from runtime.device_host import HostDevice
from runtime.engine_ram import RamWatch
from runtime.errors import ModelFilesError
from runtime.executor import Executor
from runtime.loader import LoadedModel, load_model
from runtime.ram_tier_pressure import GROW_AFTER_S, RamPressure
from tests.checkpoints import write_checkpoint
from tests.families import tiny
from tests.machines import emulated_profile

PROFILE = emulated_profile(link_bytes_per_s=2e9, cpu_bytes_per_s=2e9, host_layer_s=1e-5)
PROMPT = torch.arange(10, 22)[None]
NEW_TOKENS = 3
MIB = 2**20


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-shards")
    write_checkpoint(tiny("qwen3_moe", num_hidden_layers=4), folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


@contextmanager
def opened(folder: Path, ram_experts: int | None, poison: bool = True) -> Iterator[LoadedModel]:
    loaded = load_model(
        folder,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
        ram_experts=ram_experts,
    )
    store: Any = loaded.store
    fill, chance = store.fill, random.Random(5)

    def poisoned(expert: ExpertId, place: int) -> None:
        store._blocks.memory(place).fill_(0xDB)
        if chance.random() < 0.1:
            time.sleep(0.002)
        fill(expert, place)

    if poison:
        store.fill = poisoned
    try:
        yield loaded
    finally:
        loaded.store.close()


@contextmanager
def executing(loaded: LoadedModel, policy: PolicyName, slots: int) -> Iterator[Executor]:
    device = HostDevice() if policy == "cpu-only" else EmulatedDevice(PROFILE)
    slots = 0 if policy == "cpu-only" else slots
    executor = Executor(device, loaded.layers, loaded.store, PROFILE, slots, policy)
    attach(loaded.layers, executor.run)
    try:
        yield executor
    finally:
        executor.close()


def logits(loaded: LoadedModel, executor: Executor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """The logits of a prompt's last token and of greedy tokens after it."""
    ids, past, seen = PROMPT, None, []
    with torch.inference_mode():
        for _ in range(new_tokens):
            executor.begin_pass(ids.shape[1], ids[0].tolist(), span=ids.shape[1])
            output = loaded.model(input_ids=ids, past_key_values=past, use_cache=True)
            seen.append(output.logits[0, -1])
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    return torch.stack(seen)


@pytest.fixture(scope="module")
def expected(two_shards: Path) -> dict[Path, torch.Tensor]:
    """What comes out with everything in RAM and computed on the CPU."""
    found = {}
    for folder in (DEFAULT_MODEL_DIR, two_shards):
        with opened(folder, None) as loaded, executing(loaded, "cpu-only", 0) as executor:
            found[folder] = logits(loaded, executor)
    return found


@pytest.mark.parametrize("model", ["default", "two shards"])
@pytest.mark.parametrize("share", ["all", "half", "least"])
def test_no_policy_and_no_size_of_ram_changes_a_bit(
    model: str, share: str, two_shards: Path, expected: dict[Path, torch.Tensor]
) -> None:
    folder = DEFAULT_MODEL_DIR if model == "default" else two_shards
    count = 192 if model == "default" else 32
    ram_experts = {"all": None, "half": count // 2, "least": 1}[share]
    with opened(folder, ram_experts) as loaded:
        assert loaded.shape.expert_count == count
        for policy in POLICIES:
            with executing(loaded, policy, slots=12) as executor:
                assert torch.equal(logits(loaded, executor), expected[folder]), policy
                counters = executor.counters()
            assert counters.disk_bytes > 0 or share != "least", policy
        assert loaded.store.ram_bytes == (ram_experts or count) * loaded.store.slot_bytes


def test_what_the_cpu_needs_is_read_several_at_a_time(two_shards: Path) -> None:
    with opened(two_shards, 16, poison=False) as loaded:
        store: Any = loaded.store
        fill, now, most = store.fill, [0], [0]

        def watched(expert: ExpertId, place: int) -> None:
            now[0] += 1
            most[0] = max(most[0], now[0])
            time.sleep(0.01)
            fill(expert, place)
            now[0] -= 1

        store.fill = watched
        with executing(loaded, "cpu-only", 0) as executor:
            logits(loaded, executor)
            stats = executor.counters()
    assert most[0] > 2
    assert 0 < stats.disk_stall_s == pytest.approx(stats.stall_s)


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
@pytest.mark.parametrize("policy", ["on-demand", "cpu-only"])
def test_a_file_that_changes_fails_its_request_and_nothing_else(
    how: str, policy: PolicyName, two_shards: Path, tmp_path: Path
) -> None:
    copies = {}
    for path in two_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".safetensors":
            copies[tmp_path / path.name] = path.read_bytes()
    with opened(tmp_path, 8) as loaded, executing(loaded, policy, slots=6) as executor:
        good = logits(loaded, executor)
        for path, content in copies.items():
            with path.open("r+b") as file:
                if how == "truncated":
                    file.truncate(len(content) // 3)
                else:
                    file.write(content[:100])
                    file.flush()
        with pytest.raises(ModelFilesError, match=r"model-\d+-of-\d+\.safetensors"):
            logits(loaded, executor)
        with pytest.raises(ModelFilesError):
            logits(loaded, executor)
        executor.resize_ram(4)
        executor.resize_ram(8)
        assert executor.slots_used <= 6, "the engine lives on"
    with opened(two_shards, 8) as loaded, executing(loaded, policy, slots=6) as executor:
        assert torch.equal(logits(loaded, executor), good)


def test_deleting_the_files_of_a_loaded_model_changes_nothing(
    two_shards: Path, tmp_path: Path, expected: dict[Path, torch.Tensor]
) -> None:
    for path in two_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with opened(tmp_path, 4) as loaded, executing(loaded, "cpu-miss", slots=6) as executor:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        assert torch.equal(logits(loaded, executor), expected[two_shards])


@pytest.mark.parametrize("policy", ["prescope", "on-demand", "cpu-only"])
def test_ram_shrinks_and_grows_between_tokens(
    policy: PolicyName, two_shards: Path, expected: dict[Path, torch.Tensor]
) -> None:
    with opened(two_shards, None) as loaded, executing(loaded, policy, slots=6) as executor:
        sizes = iter([32, 20, 3, 1, 9, 32])
        begin_pass = executor.begin_pass

        def resizing(*arguments: Any, **options: Any) -> None:
            size = next(sizes, 32)
            assert executor.resize_ram(size) == size == executor.ram_experts
            begin_pass(*arguments, **options)

        executor.begin_pass = resizing  # type: ignore[method-assign]
        long = logits(loaded, executor, 8)
        assert torch.equal(long[:NEW_TOKENS], expected[two_shards])
        assert executor.counters().disk_bytes > 0
    with opened(two_shards, None) as loaded, executing(loaded, "cpu-only", 0) as executor:
        assert torch.equal(long, logits(loaded, executor, 8))


def test_memory_goes_back_in_blocks(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.store_blocks.LEAST_BLOCK_BYTES", 4096 * 6)
    with opened(two_shards, None) as loaded, executing(loaded, "cpu-only", 0) as executor:
        whole = loaded.store.ram_bytes
        logits(loaded, executor)
        executor.resize_ram(7)
        assert loaded.store.ram_bytes < whole / 2
        logits(loaded, executor)
        executor.resize_ram(10**6)
        assert loaded.store.ram_bytes == whole
        assert executor.ram_experts == 32


class Ram:
    """What a watch resizes."""

    def __init__(self, experts: int) -> None:
        self.ram_experts = experts

    def resize_ram(self, experts: int) -> int:
        self.ram_experts = experts
        return experts


def watch(free: list[int], held: int = 100, most: int = 100) -> list[int]:
    """Let a watch see one reading a second, in MiB; return how many experts it left in RAM."""
    ram, second = Ram(held), [0.0]
    pressure = RamPressure(16384 * MIB, 4096 * MIB, 10 * MIB, most=most, least=8)
    assert pressure.low_bytes == 409 * MIB + 629145
    looking = RamWatch(ram, pressure, lambda: free[int(second[0])] * MIB, lambda: second[0])
    seen = []
    for number in range(len(free)):
        second[0] = float(number)
        looking()
        looking()  # the second look within a second is none
        seen.append(ram.ram_experts)
    return seen


def test_pressure_is_answered_at_once_and_more_than_enough() -> None:
    assert watch([3000, 500, 411, 410]) == [100, 100, 100, 100]
    after = watch([3000, 400])[-1]
    freed = (100 - after) * 10
    assert 400 + freed >= 2 * 409
    assert watch([0, -5]) == [100, 100], "a system that cannot tell is left alone"
    assert watch([1] * 30)[-1] == 8, "never below the least"


def test_ram_grows_back_slowly_and_only_into_clear_room() -> None:
    seconds = int(GROW_AFTER_S)
    seen = watch([3000] * (3 * seconds + 2), held=50)
    assert seen[seconds - 1] == 50
    assert seen[seconds] == 55
    assert seen[-1] == 65
    assert watch([820] * 100, held=50)[-1] == 50, "no room for one more beside the reserve"
    assert watch([3000, 600] * 60, held=50)[-1] == 50, "calm has to last"
    swinging = watch([900 if second % 2 else 380 for second in range(60)])
    assert swinging == sorted(swinging, reverse=True), "never chases its own tail"


def test_a_machine_that_was_full_from_the_start_keeps_its_experts() -> None:
    pressure = RamPressure(64 * 2**30, 600 * MIB, 10 * MIB, most=100, least=8)
    assert pressure.experts(0.0, 500 * MIB, 100) == 100
    assert pressure.experts(1.0, 200 * MIB, 100) < 100
