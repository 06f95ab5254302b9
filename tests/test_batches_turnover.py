"""Requests that join, wait, stop or fail: each has its turn, and answers of others stay exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import runtime.engine_generation as engine_generation
from runtime.core import Delta, Finished, Message, SamplingParams
from runtime.engine_generation import Generation
from runtime.layer_rows import RoutedTokens
from runtime.loader import LoadedModel
from runtime.sequences import MAX_TOGETHER
from tests.batches import (
    CHUNK_TOKENS,
    NotedSampler,
    Request,
    alone,
    answer_of,
    assert_same,
    engine_over,
    models_made_once,
    requests_for,
    together,
)


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_generation, "Sampler", NotedSampler)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    return models_made_once(tmp_path_factory)


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
