"""What `CudaDevice` asks of the driver and in which order; no card is needed for that."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.core import ExpertId, PolicyName
from runtime.device_pinned import LEAST_BYTES, PinnedPlaces
from runtime.executor import Executor
from tests.cuda_stand_in import cuda_device
from tests.families import make_checkpoint
from tests.machines import emulated_profile
from tests.test_equivalence import NEXT, PROMPT, assert_bitwise, executing, load, stock

PROFILE = emulated_profile()
BF16, INT64 = torch.bfloat16, torch.int64


def plain(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8)


def test_places_do_not_overlap_until_all_are_taken_back() -> None:
    places = PinnedPlaces(plain)
    shapes = [((1, 33), BF16), ((1, 8), INT64), ((3, 5), torch.float32), ((2000, 512), BF16)]
    for _ in range(3):
        places.start_over()
        taken = [places.take(torch.Size(shape), dtype) for shape, dtype in shapes]
        for number, one in enumerate(taken):
            one.fill_(number)
        for number, one in enumerate(taken):
            assert (one == number).all()
            assert one.data_ptr() % 64 == 0


def test_memory_for_places_is_allocated_once_for_the_most_that_is_wanted() -> None:
    sizes: list[int] = []

    def allocate(size_bytes: int) -> torch.Tensor:
        sizes.append(size_bytes)
        return plain(size_bytes)

    places = PinnedPlaces(allocate)
    for _ in range(2):
        for rows in (1, 700, 3):
            places.start_over()
            with torch.inference_mode():
                first = places.take(torch.Size((rows, 2048)), BF16)
            first.fill_(1)  # outside inference mode as well
    assert sizes == [LEAST_BYTES, 2 * 700 * 2048 * 2]


def answer(model: Any, executor: Executor | None = None) -> list[torch.Tensor]:
    """Logits of a token, a prompt after it, and another token, of one sequence."""
    found, past = [], None
    with torch.inference_mode(), executor.computing() if executor else nullcontext():
        for ids in (NEXT[:1], PROMPT[:1], NEXT[1:]):
            if executor is not None:
                executor.begin_pass(ids.numel(), span=ids.numel())
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits)
    return found


@pytest.mark.parametrize("policy", ["on-demand", "cpu-miss", "hybrid", "prescope"])
def test_the_card_s_own_code_computes_what_eager_does(
    policy: PolicyName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    theirs = answer(stock(folder))
    loaded = load(folder)
    device, log = cuda_device(monkeypatch, PROFILE)
    executor = Executor(device, loaded.layers, loaded.store, PROFILE, 5, policy)
    attach(loaded.layers, executor.run)
    try:
        for _ in range(2):
            assert_bitwise(answer(loaded.model, executor), theirs)
        counters = executor.counters()
    finally:
        executor.close()
    assert sum(counters.served) == counters.routed > 0
    assert (counters.served_cpu > 0) == (policy != "on-demand")
    assert counters.link_bytes_issued or policy == "cpu-miss"


def test_the_cpu_gets_its_rows_without_waiting_for_the_experts_launched_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a layer is served nothing is waited for but a read-back on a stream of its own, which
    waits for nothing that was launched in this layer."""
    loaded = load(make_checkpoint("qwen3_moe", tmp_path))
    device, log = cuda_device(monkeypatch, PROFILE)

    def noting(name: str, call: Any) -> Any:
        def noted(*args: Any) -> Any:
            log(name)
            return call(*args)

        return noted

    for name in ("begin_layer", "launch", "on_cpu"):
        setattr(device, name, noting(name, getattr(device, name)))
    with executing(loaded, "cpu-miss", 9, device) as executor:
        cache = executor.residency.cache
        for number in range(9):
            cache.reserve(ExpertId(number % 2, number), None, 0.0, prefetched=False)
            cache.landed(number)  # what it holds does not matter here
        answer(loaded.model, executor)
    layers: list[list[tuple[Any, ...]]] = []
    for entry in log.entries:
        if entry[0] == "begin_layer":
            layers.append([])
        elif layers:
            layers[-1].append(entry)
    both = read_beside = 0
    for layer in layers:
        kinds = [entry[0] for entry in layer]
        if "on_cpu" not in kinds:
            continue
        last = max(number for number, kind in enumerate(kinds) if kind == "on_cpu")
        if ("enter", device._reading.number) in layer:
            read_beside += 1
            waits = [entry for entry in layer if entry[:2] == ("wait", device._reading.number)]
            assert waits == [("wait", device._reading.number, device._routed.number)]
            last = layer.index(("synchronize", device._read.number))
        both += "launch" in kinds[:last]
        assert not any(kind.startswith("synchronize") for kind in kinds[:last])
    assert both > 0, "no layer had work for both"
    assert read_beside > 0, "no prompt's rows were read beside launched experts"


def test_the_card_knows_when_it_had_nothing_left_to_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, log = cuda_device(monkeypatch, PROFILE)
    device.to_host([torch.ones(1, 4)])
    device._routed.at_ms, device._routed_s = 100.0, 50.0
    done_s = device.watch_compute()
    device._computed.at_ms = 107.5
    assert done_s() == pytest.approx(50.0075)
    monkeypatch.setattr(device._computed, "query", lambda: False, raising=False)
    assert done_s() == pytest.approx(device.now_s(), abs=0.5), "still computing: not idle yet"
    assert not [entry for entry in log.entries if entry[0] == "synchronize stream"]


def test_the_card_foresees_how_long_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = cuda_device(monkeypatch, PROFILE)
    device.to_host([torch.ones(1, 4)])
    assert device.busy_until_s() <= device.now_s()
    rate = PROFILE.device_bytes_per_s.value
    for _ in range(2):
        device.launch(0, int(rate), 1, lambda: None)
    assert device.busy_until_s() - device.now_s() == pytest.approx(2.0, abs=0.5)
    device.to_host([torch.ones(1, 4)])
    assert device.busy_until_s() <= device.now_s()


def test_no_more_is_pinned_than_the_driver_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = replace(PROFILE, pinnable_bytes=100 << 20)
    device, log = cuda_device(monkeypatch, limited)
    blocks = [device.allocate_host(40 << 20) for _ in range(4)]
    staging = device.allocate_host(1 << 20)
    assert [device.is_pinned(block[5:9]) for block in blocks] == [True, True, False, False]
    assert device.is_pinned(staging)
    assert not device.notes, "the plan has said so already"
    device.release_host(blocks[0])
    assert not device.is_pinned(blocks[0])
    assert device.is_pinned(device.allocate_host(40 << 20))


def test_every_pinned_block_has_pages_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device, log = cuda_device(monkeypatch, PROFILE)
    blocks = [device.allocate_host(size_bytes) for size_bytes in (100, 100, 5000, 4096, 100) * 20]
    assert all(device.is_pinned(block) for block in blocks)
    assert [block.numel() for block in blocks[:3]] == [100, 100, 5000]
    for block in blocks[::2]:
        device.release_host(block)
    assert [device.is_pinned(block) for block in blocks[:2]] == [False, True]
    device.close()


def test_a_refused_pin_is_said_once_and_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, log = cuda_device(monkeypatch, PROFILE)
    log.may_pin = lambda size_bytes: size_bytes < 2 << 20 or sum(log.pins) <= 100 << 20
    blocks = [device.allocate_host(40 << 20) for _ in range(5)]
    assert [device.is_pinned(block) for block in blocks] == [True, True, False, False, False]
    assert len(log.pins) == 3
    assert device.is_pinned(device.allocate_host(1 << 20)), "staging buffers are asked for anyway"
    (note,) = device.notes
    assert "refused to pin 40 MiB" in note
