"""The whole engine on a card, predictor and all: transformers' own tokens of the built-in model."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter_reference import generate_greedy, load_reference
from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import Delta, Finished, LoadRequest, Message, SamplingParams
from runtime.engine import Engine
from runtime.engine_generation import Generation
from tests.cards import CARDS, assert_closes, failing_every_third_copy
from tests.cuda_stand_in import cuda_device
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
