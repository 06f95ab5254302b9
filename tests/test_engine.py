"""The decoding loop gives transformers' own tokens, whatever is reused, chunked or stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from runtime.adapter_cache import KvCache
from runtime.core import (
    Accepted,
    Delta,
    Finished,
    GenerationChunk,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.engine import Engine
from runtime.errors import ContextLengthError, MemoryPlanError, ModelError, RequestError
from tests.standin import (
    CONTEXT_TOKENS,
    RealTimeDevice,
    StandInDevice,
    StandInExecutor,
    engine,
    model,
    tokenizer,
)

PROMPTS = ["a", "hello there", "éà🙂 mixed", "x" * 150, "one\ntwo\n\nthree", "<|im_end|>", " "]
GREEDY = SamplingParams(max_new_tokens=24)


def ask(
    one: Engine,
    text: str | Sequence[Message],
    params: SamplingParams = GREEDY,
    *,
    name: str = "c",
    stop: Callable[[], bool] = lambda: False,
) -> list[GenerationChunk]:
    messages = [Message("user", text)] if isinstance(text, str) else text
    return list(one.generate(name, messages, params, stop))


def ids_of(chunks: Sequence[GenerationChunk]) -> list[int]:
    return [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]


def text_of(chunks: Sequence[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Delta))


def end_of(chunks: Sequence[GenerationChunk]) -> Finished:
    ends = [chunk for chunk in chunks if isinstance(chunk, Finished)]
    assert ends == [chunks[-1]]
    return ends[0]


def reused(chunks: Sequence[GenerationChunk]) -> int:
    assert isinstance(chunks[0], Accepted)
    return chunks[0].reused_tokens


def reference(text: str, new: int, network: Any = None) -> list[int]:
    words = tokenizer()
    from runtime.prompts import PromptEncoder

    ids = torch.tensor([PromptEncoder(words).encode([Message("user", text)], CONTEXT_TOKENS).ids])
    made = (network or model()).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=words.eos_token_id,
    )
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_generate(text: str) -> None:
    assert ids_of(ask(engine(), text)) == reference(text, 24)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_tokens_are_those_of_generate_for_other_weights(seed: int) -> None:
    chunks = ask(engine(network=model(seed)), "weights")
    assert ids_of(chunks) == reference("weights", 24, model(seed))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prefill_in_chunks_gives_the_same_tokens(chunk: int) -> None:
    executor = StandInExecutor()
    assert ids_of(ask(engine(chunk=chunk, executor=executor), "x" * 150)) == reference(
        "x" * 150, 24
    )
    assert max(executor.passes) == chunk


def test_the_text_is_what_the_ids_say() -> None:
    chunks = ask(engine(), "text", SamplingParams(max_new_tokens=60))
    decoded = tokenizer().decode(ids_of(chunks), skip_special_tokens=True)
    assert text_of(chunks).rstrip("\ufffd") == decoded.rstrip("\ufffd")


def test_the_same_seed_gives_the_same_answer_and_another_seed_another() -> None:
    params = [SamplingParams(max_new_tokens=20, temperature=1.5, seed=s) for s in (1, 1, 2)]
    first, again, other = (ids_of(ask(engine(), "dice", p)) for p in params)
    assert first == again
    assert first != other


def test_an_end_token_ends_the_answer_and_is_not_shown() -> None:
    plain = reference("stop", 24)
    end = plain[5]
    chunks = ask(engine(eos=[end]), "stop")
    assert ids_of(chunks) == plain[: plain.index(end) + 1]
    assert end_of(chunks).reason == "stop"
    shown = tokenizer().decode(plain[: plain.index(end)], skip_special_tokens=True)
    assert text_of(chunks).rstrip("\ufffd") == shown.rstrip("\ufffd")


def test_figures_are_exact() -> None:
    device, executor = StandInDevice(), StandInExecutor()
    one = engine(device=device, executor=executor, chunk=64, eos=[])
    ask(one, "warm up")
    chunks = ask(one, "x" * 150, SamplingParams(max_new_tokens=5))
    stats = end_of(chunks).stats
    assert isinstance(chunks[0], Accepted)
    assert (stats.prompt_tokens, stats.new_tokens) == (chunks[0].prompt_tokens, 5)
    prefill_passes = 3
    assert stats.ttft_s == prefill_passes * 0.5
    assert stats.decode_tokens_per_s == 2.0
    assert stats.routed == stats.served_resident == (prefill_passes + 4) * 6
    assert stats.hit_rate == 1.0
    assert stats.emulated


# Reuse


def conversation(turns: int) -> list[Message]:
    kinds = ("user", "assistant")
    return [Message(kinds[i % 2], f"turn {i} 語") for i in range(2 * turns - 1)]  # type: ignore[arg-type]


def test_the_second_turn_reuses_the_first_and_says_the_same() -> None:
    one = engine()
    first = ask(one, "question one")
    turns = [
        Message("user", "question one"),
        Message("assistant", text_of(first)),
        Message("user", "question two"),
    ]
    second = ask(one, turns)
    assert reused(second) > 20
    fresh = ask(engine(), turns)
    assert reused(fresh) == 0
    assert ids_of(second) == ids_of(fresh)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.text("xy ", max_size=6)), max_size=5))
def test_whatever_was_asked_before_the_answer_is_that_of_a_fresh_engine(
    before: list[tuple[str, str]],
) -> None:
    params = SamplingParams(max_new_tokens=6)
    one = engine(kv_tokens=90)
    for name, text in before:
        ask(one, f"xx{text}", params, name=name)
    assert ids_of(ask(one, "xxy y", params, name="a")) == ids_of(ask(engine(), "xxy y", params))


def test_the_same_question_again_computes_one_token_of_its_prompt() -> None:
    executor = StandInExecutor()
    one = engine(executor=executor)
    first = ask(one, "again")
    executor.passes.clear()
    second = ask(one, "again")
    assert ids_of(first) == ids_of(second)
    assert executor.passes[0] == 1


def test_conversations_do_not_mix() -> None:
    one = engine()
    alone = ids_of(ask(one, "mine", name="a"))
    other = ask(one, "theirs", name="b")
    assert reused(other) == 0
    assert ids_of(ask(one, "mine", name="a")) == alone


def test_old_conversations_go_when_the_budget_is_full() -> None:
    one = engine(kv_tokens=120)
    for name in "abcdef":
        ask(one, "hello", SamplingParams(max_new_tokens=8), name=name)
        assert one.kept_tokens <= 120
    assert reused(ask(one, "hello", name="f")) > 0
    assert reused(ask(one, "hello", name="a")) == 0


@pytest.fixture(scope="module")
def sliding() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=CONTEXT_TOKENS,
    )
    return Gemma3ForCausalLM(config).float().eval().requires_grad_(False), config


def test_a_cache_that_forgets_is_not_cut(sliding: tuple[Any, Any]) -> None:
    network, config = sliding
    one = engine(network=network, config=config, chunk=8, eos=[])
    first = ask(one, "a question of some length")
    assert reused(ask(one, "a question of another kind")) == 0
    ask(one, "a question of some length")
    turns = [
        Message("user", "a question of some length"),
        Message("assistant", text_of(first)),
        Message("user", "next"),
    ]
    with_reuse = ask(one, turns)
    fresh = ask(engine(network=network, config=config, chunk=8, eos=[]), turns)
    assert ids_of(with_reuse) == ids_of(fresh)


class OnePiece(KvCache):
    """The cache of a family that must be given a prompt whole."""

    def __init__(self) -> None:
        super().__init__(model().config)
        self.continues = False


def test_a_family_that_needs_whole_prompts_gets_them() -> None:
    executor = StandInExecutor()
    one = engine(executor=executor, chunk=8, new_cache=OnePiece)
    first = ask(one, "a prompt longer than a chunk")
    assert isinstance(first[0], Accepted)
    assert executor.passes[0] == first[0].prompt_tokens > 8
    assert reused(ask(one, "a prompt longer than a chunk")) == first[0].prompt_tokens - 1
    assert reused(ask(one, "a prompt longer than a cat")) == 0


# Stopping


@pytest.mark.parametrize("asked_at", range(12))
def test_a_stop_at_any_step_ends_there_and_leaves_the_cache_true(asked_at: int) -> None:
    executor = StandInExecutor()
    one = engine(chunk=8, executor=executor, eos=[])
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > asked_at

    chunks = ask(one, "x" * 20, stop=stop)
    assert end_of(chunks).reason == "cancelled"
    assert len(executor.passes) == asked_at
    assert len(ids_of(chunks)) == max(0, asked_at - 4)
    full = ids_of(ask(engine(eos=[]), "x" * 20))
    assert ids_of(chunks) == full[: len(ids_of(chunks))]
    assert ids_of(ask(one, "x" * 20)) == full


class Interrupting:
    """A model that calls back between its layers, as the executor's seam does."""

    def __init__(self) -> None:
        self.between: Callable[[], None] = lambda: None
        self._network = model()
        self.handles = [
            layer.register_forward_hook(lambda *_: self.between())
            for layer in self._network.model.layers
        ]

    def __call__(self, **inputs: Any) -> Any:
        return self._network(**inputs)


@pytest.mark.parametrize("asked_at", range(1, 10))
def test_a_prefill_is_stopped_between_its_layers(asked_at: int) -> None:
    network = Interrupting()
    try:
        one = engine(network=network, chunk=16, eos=[])
        network.between = one.heartbeat
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > asked_at

        chunks = ask(one, "x" * 30, stop=stop)
        assert end_of(chunks).reason == "cancelled"
        assert asked == asked_at + 1
        assert ids_of(ask(one, "x" * 30)) == ids_of(ask(engine(eos=[]), "x" * 30))
    finally:
        for handle in network.handles:
            handle.remove()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_closing_the_iterator_keeps_what_was_computed(after: int) -> None:
    one = engine(eos=[])
    chunks = one.generate("c", [Message("user", "close me")], GREEDY)
    for _ in range(after):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    again = ask(one, "close me")
    assert (reused(again) > 0) == (after > 1)
    assert ids_of(again) == ids_of(ask(engine(eos=[]), "close me"))


def test_a_failing_pass_forgets_the_conversation_and_reaches_the_caller() -> None:
    calls = 0

    def network(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = model()(**inputs)
        if calls == 4:
            raise RuntimeError("boom")
        return output

    one = engine(network=network, eos=[])
    with pytest.raises(RuntimeError, match="boom"):
        ask(one, "fail")
    assert one.kept_tokens == 0
    assert ids_of(ask(one, "fail")) == ids_of(ask(engine(eos=[]), "fail"))


@pytest.mark.parametrize("failing", [1, 2, 4, 5])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_running_out_of_memory_is_tried_again_with_fewer_slots(first: int, failing: int) -> None:
    calls = 0
    executor = StandInExecutor()

    def network(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = model()(**inputs)
        if first <= calls < first + failing:
            raise torch.OutOfMemoryError("2 GiB more are needed")
        return output

    one = engine(network=network, chunk=16, eos=[], executor=executor)
    full = ids_of(ask(engine(chunk=16, eos=[]), "memory"))
    if failing < 5:
        assert ids_of(ask(one, "memory")) == full
        assert executor.shrinks == max(failing - 1, 0)
    else:
        with pytest.raises(MemoryPlanError, match="2 GiB"):
            ask(one, "memory")
        assert one.kept_tokens == 0
        assert ids_of(ask(one, "memory")) == full


def test_invalid_numbers_end_the_answer_with_words() -> None:
    def network(**inputs: Any) -> Any:
        output = model()(**inputs)
        output.logits[:] = float("nan")
        return output

    with pytest.raises(ModelError, match="invalid numbers"):
        ask(engine(network=network), "nan")


# Limits


def test_the_context_is_never_exceeded_and_ends_the_answer() -> None:
    one = engine(context_tokens=60, eos=[])
    chunks = ask(one, "fill", SamplingParams(max_new_tokens=500))
    stats = end_of(chunks).stats
    assert end_of(chunks).reason == "length"
    assert stats.prompt_tokens + stats.new_tokens == 60


@pytest.mark.parametrize(("context", "kv"), [(40, 512), (512, 40)])
def test_a_prompt_that_does_not_fit_is_refused_with_numbers_before_any_pass(
    context: int, kv: int
) -> None:
    executor = StandInExecutor()
    one = engine(context_tokens=context, kv_tokens=kv, executor=executor)
    with pytest.raises(ContextLengthError, match=r"\d+ tokens.*holds 40"):
        ask(one, "x" * 40)
    assert executor.passes == []


def test_the_number_of_new_tokens_is_kept() -> None:
    chunks = ask(engine(eos=[]), "short", SamplingParams(max_new_tokens=3))
    assert len(ids_of(chunks)) == 3
    assert end_of(chunks).reason == "length"


def test_bad_parameters_and_empty_requests_are_refused() -> None:
    with pytest.raises(RequestError):
        ask(engine(), "x", SamplingParams(max_new_tokens=0))
    with pytest.raises(RequestError):
        ask(engine(), [])


def test_snapshots_follow_a_generation() -> None:
    seen = []
    one = engine(publish=seen.append, device=RealTimeDevice())
    ask(one, "snapshots")
    assert [shot.generating for shot in (seen[0], seen[-1])] == [True, False]
    assert [shot.sequence for shot in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].model == "tiny"
    one.set_policy("cpu-miss")
    assert seen[-1].policy == "cpu-miss"


def test_the_panel_shows_the_speed_of_all_requests_together() -> None:
    """One pass takes half a second: each request makes 2 tokens/s."""
    seen: list[Any] = []
    device = StandInDevice()
    one = engine(publish=seen.append, device=device, eos=[])

    def speed() -> float:
        one.announce()
        assert seen[-1].generating
        return float(seen[-1].tokens_per_s)

    def submit(most: int) -> None:
        one.submit(f"{most}", [Message("user", "x")], SamplingParams(max_new_tokens=most))

    submit(40)
    for _ in range(4):
        one.step()
    assert (speed(), seen[-1].ttft_s) == (2.0, 0.5)
    for most in (6, 30):
        submit(most)
    device.time_s += 0.25
    for _ in range(4):
        one.step()
    assert (speed(), seen[-1].ttft_s) == (6.0, 0.75)
    assert seen[-1].token_s == pytest.approx(1 / 6)
    for _ in range(4):
        one.step()
    assert speed() == 4.0
    while one.answering:
        one.step()
    assert not seen[-1].generating
    assert ask(one, "again")
    one.announce()
    assert seen[-1].tokens_per_s == 2.0


def test_what_the_predictor_is_told_reaches_it() -> None:
    executor = StandInExecutor()
    one = engine(executor=executor)
    one.set_prediction(False)
    assert executor.prediction is False
    one.set_prediction(True)
    assert executor.prediction is True
    one.reset_predictor()
    assert executor.resets == 1
    assert not one.idle(10.0), "it came back at once: there is nothing to do"
    assert executor.idle_s == 10.0
    executor.idle = time.sleep  # type: ignore[method-assign]
    assert one.idle(0.01), "it used its time: there may be more to do"


def test_memory_that_is_given_back_in_a_pause_is_shown() -> None:
    executor, seen = StandInExecutor(), list[TelemetrySnapshot]()
    one = engine(executor=executor, publish=seen.append)
    one.watch_ram()
    assert not seen, "nothing changed"

    def give_back() -> None:
        executor.ram_experts = 3

    one.parts = replace(one.parts, watch_ram=give_back)
    one.watch_ram()
    assert [shot.ram_experts for shot in seen] == [3]


def test_a_device_that_refuses_everything_is_noticed() -> None:
    device = StandInDevice()
    one = engine(device=device)
    assert one.device_works()

    def refuse() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    device.wait_for_compute = refuse  # type: ignore[method-assign]
    assert not one.device_works()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ask(one, "x")
    assert not one.answering


def test_closing_the_engine_closes_what_it_runs_on() -> None:
    executor = StandInExecutor()
    one = engine(executor=executor)
    ask(one, "bye")
    one.close()
    assert executor.closed
    assert one.kept_tokens == 0
