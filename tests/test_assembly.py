"""The whole engine, every room in it, gives transformers' own tokens on the built-in model."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from runtime.adapter_reference import generate_greedy, load_reference
from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR, DEFAULT_MODEL_NAME
from runtime.core import (
    Delta,
    Finished,
    GenerationStats,
    LoadProgress,
    LoadRequest,
    Message,
    PolicyName,
    SamplingParams,
)
from runtime.engine import Engine
from runtime.errors import CancelledError, UnsupportedModelError

QUESTIONS = ["Hello, who are you?", "What is 17 + 5?", "x" * 40, "é 語 🙂"]
NEW_TOKENS = 16
POLICIES: list[tuple[PolicyName, float]] = [
    ("on-demand", 0.01),
    ("on-demand", 1.0),
    ("cpu-miss", 0.2),
    ("hybrid", 0.2),
]


def ask(engine: Engine, text: str, stop_after: int = 10**9) -> tuple[list[int], GenerationStats]:
    ids: list[int] = []
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > stop_after

    for chunk in engine.generate(
        text, [Message("user", text)], SamplingParams(max_new_tokens=NEW_TOKENS), stop
    ):
        if isinstance(chunk, Delta):
            ids += chunk.token_ids
        elif isinstance(chunk, Finished):
            return ids, chunk.stats
    raise AssertionError("it never finished")


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What `generate` with `eager` experts answers, cut at the end of the turn."""
    engine = assemble(LoadRequest(), virtual_clock=True)
    dtype = next(engine.parts.model.parameters()).dtype  # type: ignore[attr-defined]
    stock = load_reference(DEFAULT_MODEL_DIR, dtype, "eager").to(engine.parts.device.torch_device)
    answers = {}
    for text in QUESTIONS:
        prompt = engine.prompt_ids([Message("user", text)])
        ids = generate_greedy(stock, prompt, NEW_TOKENS)
        ends = [n for n, i in enumerate(ids) if i in engine.parts.eos_token_ids]
        answers[text] = ids[: ends[0] + 1] if ends else ids
    engine.close()
    return answers


@pytest.mark.parametrize(("policy", "share"), POLICIES)
def test_every_policy_gives_the_tokens_of_eager(
    policy: PolicyName, share: float, expected: dict[str, list[int]]
) -> None:
    engine = assemble(LoadRequest(policy=policy, cache_fraction=share), virtual_clock=True)
    for text in QUESTIONS:
        ids, stats = ask(engine, text)
        assert ids == expected[text]
        assert stats.routed == (
            stats.served_resident
            + stats.served_prefetch_in_time
            + stats.served_prefetch_late
            + stats.served_on_demand
            + stats.served_cpu
        )
        assert stats.routed > 0
        assert stats.ttft_s > 0
        assert stats.policy == policy
    engine.close()


def test_a_stop_anywhere_leaves_the_engine_exact(expected: dict[str, list[int]]) -> None:
    engine = assemble(LoadRequest(policy="hybrid", cache_fraction=0.2), virtual_clock=True)
    for stop_after in range(1, 16):
        text = QUESTIONS[stop_after % len(QUESTIONS)]
        ids, _ = ask(engine, text, stop_after)
        assert ids == expected[text][: len(ids)]
        assert engine.kept_tokens <= engine.context_tokens
        engine.forget()
    for text in QUESTIONS:
        assert ask(engine, text)[0] == expected[text]
    engine.close()


def test_the_policy_can_change_between_tokens(expected: dict[str, list[int]]) -> None:
    engine = assemble(LoadRequest(policy="on-demand", cache_fraction=0.2), virtual_clock=True)
    policies = ("cpu-miss", "hybrid", "on-demand")
    for text in QUESTIONS:
        ids: list[int] = []
        messages = [Message("user", text)]
        params = SamplingParams(max_new_tokens=NEW_TOKENS)
        for number, chunk in enumerate(engine.generate(text, messages, params)):
            engine.set_policy(policies[number % 3])
            ids += chunk.token_ids if isinstance(chunk, Delta) else ()
        assert ids == expected[text]
    engine.close()


def test_another_model_without_a_card_computes_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    engine = assemble(LoadRequest(str(folder), "hybrid"))
    if engine.profile.device_kind == "cuda":
        pytest.skip("this machine has a card")
    ids, stats = ask(engine, QUESTIONS[0])
    prompt = engine.prompt_ids([Message("user", QUESTIONS[0])])
    stock = generate_greedy(load_reference(folder, None, "eager"), prompt, NEW_TOKENS)
    assert ids == stock[: len(ids)]
    assert (stats.policy, stats.emulated, stats.cache_slots) == ("cpu-only", False, 0)
    assert stats.served_cpu == stats.routed
    assert engine.name == "other"
    engine.close()


def test_the_built_in_model_has_a_name_and_says_it_is_emulated() -> None:
    engine = assemble(LoadRequest(), virtual_clock=True)
    assert engine.name == DEFAULT_MODEL_NAME
    assert engine.profile.device_kind in ("emulated", "cuda")
    engine.close()


def test_a_load_that_waits_for_its_rehearsal_says_so_and_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling takes seconds after an update; nobody has to sit them out."""
    done = threading.Event()
    told: list[str] = []
    monkeypatch.setattr("runtime.rehearsal.rehearse", lambda profile: done.wait(60))
    try:
        with pytest.raises(CancelledError):
            assemble(
                LoadRequest(),
                progress=lambda step: told.append(step.text),
                cancelled=lambda: told[-1:] == ["Preparing the first answer"],
                virtual_clock=True,
            )
    finally:
        done.set()


def test_a_rehearsal_that_fails_fails_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(profile: object) -> None:
        raise ZeroDivisionError("in the rehearsal")

    monkeypatch.setattr("runtime.rehearsal.rehearse", failing)
    with pytest.raises(ZeroDivisionError, match="in the rehearsal"):
        assemble(LoadRequest(), virtual_clock=True)


def test_a_load_tells_how_far_it_is_and_can_be_cancelled_anywhere() -> None:
    seen: list[LoadProgress] = []
    assemble(LoadRequest(), progress=seen.append, virtual_clock=True).close()
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0
    assert all(step.text for step in seen)
    for asked_at in (1, 3, 9):
        asked = 0

        def cancelled(at: int = asked_at) -> bool:
            nonlocal asked
            asked += 1
            return asked >= at

        with pytest.raises(CancelledError):
            assemble(LoadRequest(), cancelled=cancelled, virtual_clock=True)


def test_a_model_without_a_template_gets_ours_if_one_fits_and_is_refused_if_not(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    (folder / "chat_template.jinja").unlink()
    engine = assemble(LoadRequest(str(folder)))
    assert any("no chat template" in told and "ChatML" in told for told in engine.remarks)
    assert engine.prompt_ids([Message("user", "x")])
    engine.close()
    tokens = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokens.replace("im_start", "imstart"), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="chat template.*none of PreScope's own fits"):
        assemble(LoadRequest(str(folder)))
