"""Requests answered together get, to the last bit, what each would get alone; bytes are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.engine_generation as engine_generation
from runtime.adapter import attach, detach
from runtime.adapter_cache import KvCache
from runtime.core import (
    POLICIES,
    Accepted,
    Delta,
    Finished,
    MemoryPlan,
    Message,
    PolicyName,
    SamplingParams,
)
from runtime.device_emulated import EmulatedDevice
from runtime.engine import Engine
from runtime.engine_generation import Generation
from runtime.engine_parts import EngineParts
from runtime.executor import Executor
from runtime.layer_rows import RoutedTokens
from runtime.loader import LoadedModel, load_model
from runtime.sampler import Sampler
from runtime.sequences import MAX_TOGETHER, Conversation
from runtime.telemetry import Counters
from tests.families import FAMILIES, make_checkpoint
from tests.machines import emulated_profile

PROFILE = emulated_profile()
CONTEXT_TOKENS = 200
CHUNK_TOKENS = 16


class Letters:
    """A tokenizer for which a letter is a token, so that prompts have the lengths they show."""

    added_tokens_decoder: Mapping[int, Any] = {}
    chat_template = "letters"

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "".join(turn["content"] for turn in conversation)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [3 + ord(letter) % 140 for letter in text]

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return "".join(chr(0x4E00 + i) for i in token_ids)


@dataclass(frozen=True)
class Request:
    """`joins` is the pass before which it is submitted."""

    text: str
    params: SamplingParams
    joins: int = 0


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    stats: Any = None


class NotedSampler(Sampler):
    """Keeps the logits it was given."""

    def next_token(self, logits: torch.Tensor) -> int:
        self.__dict__.setdefault("noted", []).append(logits.clone())
        return super().next_token(logits)


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_generation, "Sampler", NotedSampler)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Tiny random models, each made once."""
    made: dict[str, LoadedModel] = {}

    def one(family: str) -> LoadedModel:
        if family not in made:
            made[family] = load(family, tmp_path_factory.mktemp(family))
        return made[family]

    return one


def load(family: str, folder: Path) -> LoadedModel:
    return load_model(
        make_checkpoint(family, folder),
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
    )


@contextmanager
def engine_over(
    loaded: LoadedModel,
    policy: str = "hybrid",
    slots: int = 5,
    kv_tokens: int = 20 * CONTEXT_TOKENS,
    network: Any = None,
) -> Iterator[Engine]:
    device = EmulatedDevice(PROFILE, virtual_clock=True)
    executor = Executor(
        device,
        loaded.layers,
        loaded.store,
        PROFILE,
        slots,
        policy,  # type: ignore[arg-type]
        virtual_clock=True,
    )
    parts = EngineParts(
        model=network or loaded.model,
        tokenizer=Letters(),
        shape=loaded.shape,
        context_tokens=CONTEXT_TOKENS,
        eos_token_ids=frozenset(),
        new_cache=lambda: KvCache(loaded.model.config),
        device=device,
        executor=executor,
        profile=PROFILE,
        plan=MemoryPlan(10**6, 1000, kv_tokens, kv_tokens * 10, 0, 0, slots, 100),
        close=executor.close,
    )
    engine = Engine(parts, prefill_chunk_tokens=CHUNK_TOKENS)
    attach(loaded.layers, engine.experts)
    try:
        yield engine
    finally:
        engine.close()
        detach(loaded.layers)


def answer_of(generation: Generation) -> Answer:
    chunks = generation.take()
    assert generation.failure is None
    assert isinstance(chunks[0], Accepted)
    (end,) = (chunk for chunk in chunks if isinstance(chunk, Finished))
    assert end is chunks[-1]
    ids = [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]
    sampler: Any = generation._sampler
    return Answer(ids, sampler.noted, end.stats)


def together(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answer all, each joining before its pass."""
    running: dict[int, Generation] = {}
    passes = 0
    while len(running) < len(requests) or engine.answering:
        for number, request in enumerate(requests):
            if request.joins <= passes and number not in running:
                running[number] = engine.submit(
                    f"c{number}", [Message("user", request.text)], request.params
                )
        engine.step()
        passes += 1
        assert passes < 2000
    return [answer_of(running[number]) for number in range(len(requests))]


def alone(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    answers = []
    for request in requests:
        engine.forget()
        answers += together(engine, [Request(request.text, request.params)])
    return answers


def assert_same(ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.ids == reference.ids
        assert len(mine.logits) == len(reference.logits) > 0
        for a, b in zip(mine.logits, reference.logits, strict=True):
            assert torch.isfinite(b).all()
            assert torch.equal(a, b), f"largest difference {(a - b).abs().max():.2e}"


def requests_for(count: int) -> list[Request]:
    """Different prompts of 1 to 40 tokens, greedy and seeded, joining at different passes."""
    return [
        Request(
            "".join(chr(40 + (7 * n + 3 * i) % 90) for i in range(1 + (n * 11) % 40)),
            SamplingParams(
                max_new_tokens=2 + (n * 5) % 9,
                temperature=0.0 if n % 2 else 1.3,
                repetition_penalty=1.2 if n % 3 == 0 else 1.0,
                seed=n,
            ),
            joins=(n * 2) % 7,
        )
        for n in range(count)
    ]


# Of those with caches of their own kind; all families were compared when this was written.
OTHER_KINDS = (
    "gemma4_text",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
)


@pytest.mark.families
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_KINDS])
def test_five_together_are_bitwise_each_alone_in_every_family(
    family: str, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models(family)) as engine:
        assert_same(together(engine, requests_for(5)), alone(engine, requests_for(5)))


@pytest.mark.parametrize("count", [1, 2, 16, 19])
def test_any_number_together_is_bitwise_each_alone(
    count: int, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        assert_same(together(engine, requests_for(count)), alone(engine, requests_for(count)))


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "cpu-only"])
def test_under_every_policy_and_cache_size_they_are_bitwise_each_alone(
    policy: PolicyName, slots: int, models: Callable[[str], LoadedModel]
) -> None:
    loaded = models("gpt_oss")
    with engine_over(loaded) as reference:
        expected = alone(reference, requests_for(4))
    with engine_over(loaded, policy, slots) as engine:
        assert_same(together(engine, requests_for(4)), expected)


def test_the_comparison_notices_a_row_of_somebody_else(
    models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        expected = alone(engine, requests_for(3))
        honest = engine.parts.executor.run_together

        def swapped(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            rows = honest(layer, parts)
            if len(rows) > 1:
                rows[0], rows[1] = rows[0].roll(1, -1), rows[1]
            return rows

        monkeypatch.setattr(engine._passes.meeting, "_run_together", swapped)
        with pytest.raises(AssertionError):
            assert_same(together(engine, requests_for(3)), expected)


@pytest.mark.parametrize("kv_tokens", [60, 100])
def test_with_little_room_for_keys_and_values_they_wait_and_are_bitwise_each_alone(
    kv_tokens: int, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models("qwen3_moe"), kv_tokens=kv_tokens) as engine:
        requests = requests_for(8)
        expected = alone(engine, requests)
        waited = 0
        grow = engine._conversations.grow

        def noted(conversation: Conversation, tokens: int) -> bool:
            nonlocal waited
            granted = grow(conversation, tokens)
            waited += not granted
            store = engine._conversations
            assert store.tokens + store.taken_tokens <= kv_tokens
            return granted

        engine._conversations.grow = noted  # type: ignore[method-assign]
        assert_same(together(engine, requests), expected)
        assert waited > 0


# What is shared


def gained(engine: Engine, work: Callable[[], object]) -> Counters:
    before = engine.parts.executor.counters()
    work()
    return engine.parts.executor.counters().since(before)


@pytest.mark.parametrize(("count", "text"), [(2, "abc"), (5, "abc"), (5, "longer than a chunk")])
def test_identical_prompts_move_the_bytes_of_one(
    count: int, text: str, models: Callable[[str], LoadedModel]
) -> None:
    """Exactly those of one if they are read in one pass; later they are a few passes apart."""
    same = [Request(text, SamplingParams(max_new_tokens=12))] * count
    loaded = models("qwen3_moe")
    with engine_over(loaded, "on-demand", 8) as engine:
        one = gained(engine, lambda: together(engine, same[:1]))
    with engine_over(loaded, "on-demand", 8) as engine:
        many = gained(engine, lambda: together(engine, same))
    assert one.link_bytes_issued > 0
    if count * len(text) <= CHUNK_TOKENS:
        assert many.link_bytes_issued == one.link_bytes_issued
        assert (many.forward_passes, many.routed) == (one.forward_passes, one.routed)
    else:
        assert many.link_bytes_issued < 0.7 * count * one.link_bytes_issued
        assert many.forward_passes < one.forward_passes + 2 * count


def test_what_several_demand_moves_once_a_layer(models: Callable[[str], LoadedModel]) -> None:
    """Slots for one expert: whatever is demanded moves anew in every layer, once."""
    loaded = models("mixtral")
    with engine_over(loaded, "on-demand", 1) as engine:
        unions = 0
        honest = engine.parts.executor.run_together

        def counted(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            nonlocal unions
            wanted = [set(part.top_k_index.flatten().tolist()) for part in parts]
            assert len(parts) == 1 or sum(map(len, wanted)) > len(set().union(*wanted))
            unions += len(set().union(*wanted))
            return honest(layer, parts)

        engine._passes.meeting._run_together = counted
        requests = [
            Request(text, SamplingParams(max_new_tokens=6)) for text in ("abcdefgh", "hgfedcba")
        ]
        counters = gained(engine, lambda: together(engine, requests))
        assert counters.routed == unions
        size = loaded.layers[0].format.size_bytes
        assert counters.link_bytes_on_demand == counters.served_on_demand * size <= unions * size


def test_four_together_are_faster_than_one_after_the_other(
    models: Callable[[str], LoadedModel],
) -> None:
    requests = [
        Request(text, SamplingParams(max_new_tokens=24)) for text in ("one", "two", "three", "four")
    ]

    def seconds(answer: Callable[[Engine, Sequence[Request]], object]) -> float:
        with engine_over(models("qwen3_moe"), "on-demand", 5) as engine:
            answer(engine, requests)
            return engine.parts.device.now_s()

    assert seconds(together) < seconds(alone)


def test_figures_add_up_for_everybody_and_speed_is_ones_own(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        for answer in together(engine, requests_for(7)):
            stats = answer.stats
            served = (
                stats.served_resident
                + stats.served_prefetch_in_time
                + stats.served_prefetch_late
                + stats.served_on_demand
                + stats.served_cpu
            )
            assert stats.routed == served > 0
            assert stats.new_tokens == len(answer.ids)
            assert stats.ttft_s > 0
            assert (stats.decode_tokens_per_s > 0) == (stats.new_tokens > 1)


# Joining, leaving, failing


def test_a_long_prompt_delays_the_others_by_one_chunk_a_token(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        talker = engine.submit("a", [Message("user", "x")], SamplingParams(max_new_tokens=60))
        engine.step()
        long = [
            engine.submit(f"l{n}", [Message("user", "y" * 8 * CHUNK_TOKENS)], SamplingParams())
            for n in range(2)
        ]
        short = engine.submit("s", [Message("user", "z" * 4)], SamplingParams(max_new_tokens=50))
        sizes: list[int] = []
        executor: Any = engine.parts.executor
        begin_pass = executor.begin_pass

        def noted(tokens: int, *more: Any) -> None:
            sizes.append(tokens)
            begin_pass(tokens, *more)

        executor.begin_pass = noted
        for number in range(16):
            engine.step()
            assert talker.timing.new_tokens == number + 2
            assert sizes[-1] <= CHUNK_TOKENS + 2
        assert short.timing.new_tokens > 10
        assert all(one.passes == 8 for one in long) or {one.passes for one in long} == {7, 8}


def test_a_prompt_is_broken_off_between_its_layers_and_nobody_else(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        requests = requests_for(2)
        expected = alone(engine, requests)
        others = [
            engine.submit(f"c{n}", [Message("user", one.text)], one.params)
            for n, one in enumerate(requests)
        ]
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == 2  # first before the pass, then after its first layer

        stopped = engine.submit("s", [Message("user", "x")], SamplingParams(), stop)
        engine.step()
        assert (asked, stopped.over, stopped.passes) == (2, True, 0)
        assert isinstance(stopped.take()[-1], Finished)
        while engine.answering:
            engine.step()
        assert_same([answer_of(one) for one in others], expected)


def test_no_more_than_so_many_at_once_and_the_others_in_their_order(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        stopped: set[int] = set()

        def submit(number: int) -> Generation:
            most = SamplingParams(max_new_tokens=2 if number == 5 else 40)
            return engine.submit(
                f"c{number}", [Message("user", "x")], most, lambda: number in stopped
            )

        running = [submit(number) for number in range(MAX_TOGETHER + 3)]
        assert [len(one.take()) for one in running] == [1] * len(running)
        sizes: list[int] = []
        executor: Any = engine.parts.executor
        begin_pass = executor.begin_pass
        executor.begin_pass = lambda tokens, *more: [
            sizes.append(tokens),
            begin_pass(tokens, *more),
        ]
        begun = [
            [number for number, one in enumerate(running) if one.timing.new_tokens]
            for _ in range(4)
            if engine.step() is None
        ]
        assert sizes == [MAX_TOGETHER] * 4
        first = list(range(MAX_TOGETHER))
        assert begun == [first, first, [*first, MAX_TOGETHER], [*first, MAX_TOGETHER]]
        stopped.add(MAX_TOGETHER + 1)
        engine.step()
        (end,) = running[MAX_TOGETHER + 1].take()
        assert isinstance(end, Finished)
        assert (end.reason, end.stats.new_tokens) == ("cancelled", 0)
        stopped.add(0)
        engine.step()
        assert running[MAX_TOGETHER + 2].timing.new_tokens == 1


def test_one_that_fails_does_not_disturb_the_others(
    models: Callable[[str], LoadedModel],
) -> None:
    loaded = models("qwen3_moe")
    with engine_over(loaded) as engine:
        expected = alone(engine, requests_for(4))
    calls = 0

    def network(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        mine = calls
        output = loaded.model(**inputs)
        if mine == 9:
            raise RuntimeError("boom")
        return output

    with engine_over(loaded, network=network) as engine:
        running = [
            engine.submit(f"c{n}", [Message("user", one.text)], one.params)
            for n, one in enumerate(requests_for(4))
        ]
        while engine.answering:
            engine.step()
        failed = [one for one in running if one.failure is not None]
        assert [str(one.failure) for one in failed] == ["boom"]
        for number, one in enumerate(running):
            chunks = one.take()
            assert one.over
            assert isinstance(chunks[-1], Finished) == (one not in failed)
            if one not in failed:
                ids = [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]
                assert ids == expected[number].ids


@pytest.mark.parametrize("failing", [1, 2])
def test_running_out_of_memory_at_the_experts_ends_nobody_who_fits(
    failing: int, models: Callable[[str], LoadedModel]
) -> None:
    """`failing` attempts fail: the common one, then that of the first by itself as well."""
    loaded = models("qwen3_moe")
    with engine_over(loaded) as engine:
        expected = alone(engine, requests_for(4))
    with engine_over(loaded) as engine:
        honest = engine.parts.executor.run_together
        calls = 0

        def tight(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            nonlocal calls
            calls += 1
            assert calls != 9 or len(parts) > 1
            if 9 <= calls < 9 + failing:
                raise torch.OutOfMemoryError("2 GiB more are needed")
            return honest(layer, parts)

        engine._passes.meeting._run_together = tight
        assert_same(together(engine, requests_for(4)), expected)
        assert calls > 9 + failing


@pytest.mark.parametrize("failing", [1, 3])
def test_memory_that_runs_out_costs_no_text_where_caches_cannot_be_cut(
    failing: int, models: Callable[[str], LoadedModel]
) -> None:
    """Sliding windows have forgotten what a cut would need, so the chat is computed anew."""
    loaded = models("gpt_oss")
    request = Request("a window that slides", SamplingParams(max_new_tokens=12))
    with engine_over(loaded, slots=12) as engine:
        (expected,) = alone(engine, [request])
    with engine_over(loaded, slots=12) as engine:
        honest = engine.parts.executor.run_together
        calls = 0

        def tight(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            nonlocal calls
            calls += 1
            if 15 <= calls < 15 + failing:
                raise torch.OutOfMemoryError("2 GiB more are needed")
            return honest(layer, parts)

        engine._passes.meeting._run_together = tight
        (answer,) = alone(engine, [request])
        assert calls > 15 + failing
        assert answer.ids == expected.ids
        assert engine.parts.executor.slots == (12 if failing == 1 else 6)


def test_two_requests_of_one_conversation_do_not_share_a_cache(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        request = requests_for(2)[1]
        expected = alone(engine, [request])[0]
        engine.forget()
        both = [
            engine.submit("same", [Message("user", request.text)], request.params) for _ in range(2)
        ]
        caches = [one.conversation.cache for one in both if one.conversation is not None]
        assert caches[0] is not caches[1]
        while engine.answering:
            engine.step()
        assert_same([answer_of(one) for one in both], [expected, expected])
        assert engine.kept_tokens == len(expected.ids) + len(request.text) - 1


def test_iterators_advance_each_other(models: Callable[[str], LoadedModel]) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        params = SamplingParams(max_new_tokens=8)
        first = engine.generate("a", [Message("user", "first")], params)
        second = engine.generate("b", [Message("user", "second")], params)
        next(first), next(second)
        rest = list(first)
        assert isinstance(rest[-1], Finished)
        passes = engine.parts.executor.counters().forward_passes
        assert isinstance(list(second)[-1], Finished)
        assert engine.parts.executor.counters().forward_passes <= passes + 1


def test_closing_the_engine_finishes_every_request(models: Callable[[str], LoadedModel]) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        running = [
            engine.submit(f"c{n}", [Message("user", "x")], SamplingParams()) for n in range(18)
        ]
        engine.step()
    for one in running:
        end = one.take()[-1]
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
