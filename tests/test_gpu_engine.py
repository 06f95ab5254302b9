"""The whole engine on a card, predictor and all: transformers' own tokens of the built-in model."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter_reference import generate_greedy, load_reference
from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import Delta, Finished, LoadRequest, Message, SamplingParams
from runtime.device import Stream
from runtime.engine import Engine
from runtime.engine_generation import Generation
from runtime.executor import Executor
from runtime.hardware_pinning import Pinning
from tests.cards import CARDS, assert_closes, failing_every_third_copy
from tests.checkpoints import load
from tests.cuda_stand_in import cuda_device
from tests.families import make_checkpoint
from tests.machines import emulated_profile

QUESTIONS = ("What is 17 + 5?", "Tell me a story about a fox.", "Hello!", "What is a cache hit?")
NEW_TOKENS = 24


@pytest.fixture(params=CARDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of card, on which `assemble` will load in float32 whatever comes."""
    monkeypatch.setattr("runtime.assembly.dtype_for", lambda profile: torch.float32)
    if request.param == "stand-in":
        profile = replace(
            emulated_profile(1e9), device_kind="cuda", vram_free_bytes=8 << 30, device_name="none"
        )
        monkeypatch.setattr("runtime.assembly.profile_for", lambda request: profile)
        monkeypatch.setattr(
            "runtime.device_choice.open_device",
            lambda profile, plan, virtual_clock: cuda_device(monkeypatch, profile)[0],
        )
    kind: str = request.param
    return kind


def loaded(kind: str, data: Path, policy: Any = "prescope") -> Engine:
    request = LoadRequest(policy=policy, cache_fraction=0.3)
    return assemble(request, virtual_clock=kind == "emulated", data=data)


def expected(engine: Engine) -> list[list[int]]:
    """What `generate` with `eager` experts answers, cut at the end of the turn."""
    where = engine.parts.device.torch_device
    stock = load_reference(DEFAULT_MODEL_DIR, torch.float32, "eager").to(where)
    answers = []
    for text in QUESTIONS:
        prompt = engine.prompt_ids([Message("user", text)])
        ids = generate_greedy(stock, prompt, NEW_TOKENS)
        ends = [n for n, i in enumerate(ids) if i in engine.parts.eos_token_ids]
        answers.append(ids[: ends[0] + 1] if ends else ids)
    return answers


def submitted(engine: Engine, text: str) -> Generation:
    return engine.submit(text, [Message("user", text)], SamplingParams(max_new_tokens=NEW_TOKENS))


def ids_of(generation: Generation) -> list[int]:
    assert generation.failure is None
    chunks = generation.take()
    assert isinstance(chunks[-1], Finished)
    return [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]


def answers_of(engine: Engine, at_once: int) -> list[list[int]]:
    answers = []
    for first in range(0, len(QUESTIONS), at_once):
        running = [submitted(engine, text) for text in QUESTIONS[first : first + at_once]]
        while engine.answering:
            engine.step()
        answers += [ids_of(one) for one in running]
    engine.forget()
    return answers


def counters_of(engine: Engine) -> Any:
    counters = engine.parts.executor.counters()
    assert_closes(counters)
    assert sum(counters.served) == counters.routed > 0
    return counters


def test_prescope_with_its_predictor_gives_the_reference_s_tokens(
    kind: str, tmp_path: Path
) -> None:
    engine = loaded(kind, tmp_path)
    wanted = expected(engine)
    for at_once in (1, 4):
        assert answers_of(engine, at_once) == wanted
    counters = counters_of(engine)
    assert counters.predictor_s > 0
    if kind == "emulated":  # whether it pays on a real one is the policy's to find out
        assert counters.prefetches > 0
    engine.idle(1.0)  # what is learned now is used by the next answers
    assert answers_of(engine, 1) == wanted
    assert counters_of(engine).stall_s >= 0.0
    engine.close()


@pytest.mark.parametrize("kind", CARDS[1:], indirect=True)
def test_a_token_is_computed_without_waits_that_nobody_sees(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that waits for the card only `to_host` is meant to, and that waits for an event."""
    if kind != "cuda":
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    engine = loaded(kind, tmp_path)
    answers_of(engine, 1)
    model: Any = engine.parts.model
    waited: list[list[str]] = []

    def watched(*args: Any, **named: Any) -> Any:
        if named["input_ids"].shape[1] > 1:
            return model(*args, **named)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return model(*args, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                told = [str(one.message) for one in caught]
                waited.append([text for text in told if "synchronizing CUDA operation" in text])

    engine.parts = replace(engine.parts, model=watched)
    engine._passes._parts = engine.parts
    answers_of(engine, 1)
    engine.close()
    assert waited
    assert not any(waited), waited[-1]


@pytest.mark.parametrize("kind", CARDS[1:2], indirect=True)
def test_what_the_driver_refuses_to_pin_is_said_and_changes_no_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def measured(wanted_bytes: int, device_bytes: int, **_: Any) -> Pinning:
        asked.append((wanted_bytes, device_bytes))
        return Pinning(10 << 20, "refused")

    monkeypatch.setattr("runtime.hardware_pinning.LEAST_BYTES", 1)
    monkeypatch.setattr("runtime.hardware_pinning.measured", measured)
    monkeypatch.setattr("runtime.hardware.driver_version", lambda: "580.12")
    for _ in range(2):
        engine = loaded(kind, tmp_path)
        plan, store_bytes = engine.parts.plan, engine.parts.plan.ram_experts_bytes
        assert plan.pinned_bytes == 10 << 20 < store_bytes
        (told,) = [remark for remark in engine.remarks if "be pinned" in remark]
        assert "10.0 MiB" in told
        assert answers_of(engine, 4) == expected(engine)
        counters_of(engine)
        engine.close()
    assert asked == [(store_bytes, plan.used_bytes - plan.reserve_bytes)], "it was not kept"


def test_what_is_learned_is_made_on_the_compute_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_model = load(make_checkpoint("qwen3_moe", tmp_path))
    device, log = cuda_device(monkeypatch, emulated_profile())
    compute = device._streams[Stream.COMPUTE].number

    class Learning:
        weight_bytes = 0

        def improve(self, budget_s: float) -> None:
            log("improve")

        def reset(self) -> None:
            log("reset")

    executor = Executor(
        device,
        loaded_model.layers,
        loaded_model.store,
        emulated_profile(),
        3,
        "prescope",
        predictor=Learning(),  # type: ignore[arg-type]
    )
    log.entries.clear()
    executor.idle(1.0)
    executor.reset_predictor()
    inside = [("enter", compute), ("improve",), ("leave", compute)]
    assert log.entries == [*inside, ("enter", compute), ("reset",), ("leave", compute)]
    executor.close()
    loaded_model.store.close()


def test_copies_that_fail_change_no_token(kind: str, tmp_path: Path) -> None:
    engine = loaded(kind, tmp_path, "on-demand")
    failing_every_third_copy(engine.parts.device)  # type: ignore[arg-type]
    assert answers_of(engine, 2) == expected(engine)
    assert counters_of(engine).copies_failed > 0
    engine.close()


@pytest.mark.parametrize("kind", CARDS[1:], indirect=True)
def test_closed_and_loaded_again_in_one_process(kind: str, tmp_path: Path) -> None:
    engine = loaded(kind, tmp_path)
    wanted, first = expected(engine), answers_of(engine, 4)
    engine.close()
    del engine
    free_bytes = []
    for _ in range(3 if kind == "cuda" else 1):
        if kind == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            free_bytes.append(torch.cuda.mem_get_info()[0])
            assert torch.cuda.memory_allocated() < 32 << 20
        engine = loaded(kind, tmp_path)
        assert answers_of(engine, 4) == first == wanted
        engine.close()
        del engine
    if free_bytes:
        assert min(free_bytes) > free_bytes[0] - (64 << 20), "memory of the card is lost"
