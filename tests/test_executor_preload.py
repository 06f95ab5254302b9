"""Slots filled before the first token: with the right experts, uncounted, and exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.adapter import attach
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import ExpertId
from runtime.device_emulated import EmulatedDevice
from runtime.errors import CancelledError, TransferError
from runtime.executor import Executor
from runtime.hot_experts import HotExperts
from runtime.loader import LoadedModel, load_model
from tests.machines import emulated_profile

PROFILE = emulated_profile(link_bytes_per_s=50e6, cpu_bytes_per_s=110e6, host_layer_s=8e-4)
SLOTS = 40
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    model = load_model(
        DEFAULT_MODEL_DIR,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
    )
    yield model
    model.store.close()


def opened(loaded: LoadedModel, hot: HotExperts | None, policy: str = "on-demand") -> Executor:
    device = EmulatedDevice(PROFILE, virtual_clock=True)
    return Executor(
        device, loaded.layers, loaded.store, PROFILE, SLOTS, policy, virtual_clock=True, hot=hot
    )


def experts_of(loaded: LoadedModel) -> tuple[int, ...]:
    return tuple(layer.experts for layer in loaded.layers)


def generate(loaded: LoadedModel, executor: Executor) -> list[int]:
    attach(loaded.layers, executor.run)
    ids, past, chosen = torch.arange(10, 40)[None], None, []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            executor.begin_pass(ids.shape[1], ids[0].tolist(), span=ids.shape[1])
            output = loaded.model(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            chosen.append(int(ids))
    return chosen


def test_the_hottest_are_there_and_are_hits(loaded: LoadedModel) -> None:
    hot = HotExperts(experts_of(loaded), None)
    cold = opened(loaded, hot)
    expected = generate(loaded, cold)
    before = cold.counters()
    cold.close()
    used = hot.first(SLOTS)

    warm = opened(loaded, hot)
    warm.preload()
    assert set(warm.residency.cache.experts()) == set(used)
    warm.residency.cache.check()
    nothing_yet = warm.counters()
    assert (nothing_yet.link_bytes_issued, nothing_yet.link_busy_s, nothing_yet.routed) == (0, 0, 0)
    assert generate(loaded, warm) == expected
    after = warm.counters()
    warm.close()
    assert after.routed == before.routed
    assert after.served_on_demand < before.served_on_demand
    assert after.link_bytes_issued == after.link_bytes_on_demand
    assert after.link_bytes_on_demand < before.link_bytes_on_demand


def test_policies_that_place_layers_get_whole_layers(loaded: LoadedModel) -> None:
    executor = opened(loaded, HotExperts(experts_of(loaded), None), "static-split")
    executor.preload()
    first = [ExpertId(0, expert) for expert in range(min(SLOTS, loaded.layers[0].experts))]
    assert set(first) <= set(executor.residency.cache.experts())
    executor.close()


def test_a_person_who_cancels_does_not_wait_for_all_of_it(loaded: LoadedModel) -> None:
    executor = opened(loaded, HotExperts(experts_of(loaded), None))
    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(CancelledError):
        executor.preload(cancelled)
    assert 0 < executor.slots_used < SLOTS
    executor.residency.cache.check()
    executor.close()


def test_a_copy_that_fails_leaves_its_slot_free(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = opened(loaded, HotExperts(experts_of(loaded), None))
    issue, failing = executor._link.issue, [3, 4]

    def fail(chunk):  # type: ignore[no-untyped-def]
        failing[:] = [count - 1 for count in failing]
        if 0 in failing:
            raise TransferError("The copy was refused.", "")
        return issue(chunk)

    monkeypatch.setattr(executor._link, "issue", fail)
    executor.preload()
    executor.residency.cache.check()
    assert 0 < executor.residency.cache.free_slots <= 2
    assert len(generate(loaded, executor)) == NEW_TOKENS
    executor.close()


class _Exhausted:
    """A predictor whose learning finds no memory."""

    def improve(self, budget_s: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_learning_that_finds_no_memory_ends_quietly(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    executor = opened(loaded, None)
    executor._predictor = _Exhausted()  # type: ignore[assignment]
    executor.idle(0.1)
    assert "given up for now" in caplog.text
    executor._predictor = None
    executor.close()
