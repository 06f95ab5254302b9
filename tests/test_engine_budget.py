"""The engine keeps to its plan: one KV budget for all, a longest chat, chunks with a workspace."""

from __future__ import annotations

from dataclasses import replace

from runtime.core import Finished, Message, SamplingParams, Transients
from runtime.engine import Engine
from runtime.planner import prefill_tokens
from tests.standin import StandInExecutor
from tests.standin import engine as standin_engine


def planned(
    kv_tokens: int, context_tokens: int, transients: Transients, prefill_bytes: int
) -> tuple[Engine, StandInExecutor]:
    executor = StandInExecutor()
    parts = standin_engine(executor=executor).parts
    shape = replace(parts.shape, transients=transients)
    plan = replace(
        parts.plan,
        kv_tokens=kv_tokens,
        context_tokens=context_tokens,
        workspace_bytes=prefill_bytes,
        prefill_bytes=prefill_bytes,
    )
    return Engine(replace(parts, shape=shape, plan=plan)), executor


def answer(engine: Engine, text: str) -> None:
    messages = [Message("user", text)]
    chunks = list(engine.generate("chat", messages, SamplingParams(max_new_tokens=2)))
    assert isinstance(chunks[-1], Finished)


def test_a_prompt_is_read_in_chunks_that_the_workspace_has_room_for() -> None:
    transients = Transients(pair_bytes=1)
    engine, executor = planned(2048, 512, transients, 64 * 128)
    answer(engine, "x" * 300)
    prompt, computed = executor.passes[: executor.passes.index(1)], 0
    for tokens in prompt:
        assert tokens * (computed + tokens) <= engine.parts.plan.prefill_bytes
        computed += tokens
    assert computed > 300
    assert max(prompt) == 64  # the first chunks are large, the last ones small
    assert prompt[-2] == 16


def test_without_scores_in_memory_chunks_are_whole() -> None:
    engine, executor = planned(2048, 512, Transients(pair_bytes=1), 512 * 512)
    answer(engine, "x" * 300)
    assert executor.passes[0] > 300


def test_one_token_is_computed_even_where_the_workspace_is_too_small() -> None:
    engine, _ = planned(2048, 512, Transients(10**9, 0, 0), 5)
    assert prefill_tokens(engine.parts.plan, engine.parts.shape, 100) == 1


def test_the_longest_chat_is_shorter_than_the_budget_of_all() -> None:
    engine, _ = planned(2048, 200, Transients(), 0)
    assert engine.context_tokens == 200
    engine, _ = planned(100, 0, Transients(), 0)
    assert engine.context_tokens == 100


def test_several_whole_contexts_are_computed_together() -> None:
    engine, executor = planned(4 * 512, 512, Transients(), 0)
    params = SamplingParams(max_new_tokens=400)
    for number in range(4):
        engine.submit(str(number), [Message("user", "y" * 60)], params)
    for _ in range(6):
        engine.step()
    assert executor.passes[-1] == 4
