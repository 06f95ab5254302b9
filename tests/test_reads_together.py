"""Reading many tensors in one call: every byte in its place, however the system hands them out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime import disk_direct, safetensors_files
from runtime.disk_direct import DirectFile
from runtime.errors import ModelFilesError
from runtime.safetensors_files import SafetensorsFiles

Reads = list[tuple[str, int, memoryview]]
NAMES = [f"t{number:04}" for number in range(150)]
PREADV = safetensors_files._PREADV


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of 0 to 70,000 random bytes, many of them tiny, in the order of their names."""
    chance = np.random.default_rng(0)
    sizes = [int(size) for size in chance.integers(0, 70_000, len(NAMES))]
    for tiny in range(0, len(NAMES), 3):
        sizes[tiny] %= 20
    made = {
        name: torch.from_numpy(chance.integers(0, 256, size).astype(np.uint8))
        for name, size in zip(NAMES, sizes, strict=True)
    }
    save_file(made, tmp_path / "model.safetensors")
    return made


def short(read: Callable[..., int], chance: random.Random) -> Callable[..., int]:
    """Return a read that hands out as few bytes as it likes, but at least one."""

    def reading(descriptor: int, buffers: Sequence[memoryview], at: int, *rest: Any) -> int:
        wanted = sum(map(len, buffers))
        count = chance.randrange(1, wanted + 1) if wanted else 0
        some: list[memoryview] = []
        for buffer in buffers:
            some.append(buffer[: count - sum(map(len, some))])
        return read(descriptor, some, at, *rest)

    return reading


def any_reads(tensors: dict[str, torch.Tensor], chance: random.Random) -> Reads:
    """Whole tensors and parts of them, neighbours and strangers, some twice, in any order."""
    begin = chance.randrange(len(NAMES))
    chosen = NAMES[begin : begin + chance.randrange(1, 100)] + chance.choices(NAMES, k=9)
    reads: Reads = []
    for name in chosen:
        size = tensors[name].numel()
        first = chance.randrange(size + 1) if chance.random() < 0.2 else 0
        last = chance.randrange(first, size + 1) if chance.random() < 0.2 else size
        reads.append((name, first, memoryview(bytearray(last - first))))
    chance.shuffle(reads)
    return reads


@pytest.mark.parametrize("how", ["at once", "short", "past the cache", "seeking"])
def test_every_byte_comes_to_its_place(
    how: str, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(1)
    if how == "seeking":
        monkeypatch.setattr(safetensors_files, "_PREADV", None)
    elif PREADV is None:
        pytest.skip("this system has no positioned reads")
    if how == "short":
        monkeypatch.setattr(safetensors_files, "_PREADV", short(PREADV, chance))
        monkeypatch.setattr(safetensors_files, "READ_BYTES", 30_000)
    files = SafetensorsFiles(tmp_path)
    if how == "past the cache":
        # Small, so that a run of neighbours takes several reads, which end anywhere in them.
        monkeypatch.setattr(disk_direct, "BOUNCE_BYTES", 5 * disk_direct.ALIGN_BYTES)
        files.read_past_cache(True)
    for _ in range(30):
        reads = any_reads(tensors, chance)
        files.read(reads)
        for name, first, buffer in reads:
            expected = tensors[name][first : first + len(buffer)]
            assert bytes(buffer) == expected.numpy().tobytes(), name
    files.close()


@pytest.mark.skipif(PREADV is None, reason="this system has no positioned reads")
def test_neighbours_are_read_in_one_call_and_strangers_are_not(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def counting(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        calls.append((at, len(buffers)))
        count: int = PREADV(descriptor, buffers, at)
        return count

    monkeypatch.setattr(safetensors_files, "_PREADV", counting)
    files = SafetensorsFiles(tmp_path)

    def read(names: Sequence[str]) -> list[tuple[int, int]]:
        calls.clear()
        files.read([(n, 0, memoryview(bytearray(tensors[n].numel()))) for n in names])
        return list(calls)

    filled = [name for name in NAMES if tensors[name].numel()]
    assert [count for _, count in read(filled[20:30])] == [10]
    assert [count for _, count in read(filled[29:19:-1])] == [10], "in the order of the file"
    assert [count for _, count in read([filled[3], filled[60]])] == [1, 1]
    assert len(read([])) == 0
    files.close()


def test_more_neighbours_than_a_system_takes_at_once_are_read_too(tmp_path: Path) -> None:
    many = {f"t{number:05}": torch.tensor([number], dtype=torch.int16) for number in range(1500)}
    save_file(many, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    buffers = {name: bytearray(2) for name in many}
    files.read([(name, 0, memoryview(buffer)) for name, buffer in buffers.items()])
    assert [int.from_bytes(each, "little") for each in buffers.values()] == list(range(1500))
    files.close()


def test_a_run_that_ends_too_early_names_the_tensor_it_ends_in(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    files = SafetensorsFiles(tmp_path)
    last = files.tensors[NAMES[100]]
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(last.begin + last.size_bytes // 2)
    reads = [(n, 0, memoryview(bytearray(tensors[n].numel()))) for n in NAMES[90:110]]
    with pytest.raises(ModelFilesError, match=f"inside tensor '{NAMES[100]}'"):
        files.read(reads)
    files.close()


@pytest.mark.skipif(PREADV is None, reason="this system has no positioned reads")
def test_an_empty_place_among_others_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)) * 50)
    places = [bytearray(0), bytearray(5), bytearray(0), bytearray(7)]
    with open(path, "rb", buffering=0) as file:
        direct = DirectFile(file.fileno())
        assert direct.read_at([memoryview(place) for place in places], 3) == 12
        direct.close()
    assert b"".join(places) == bytes(range(3, 15))
