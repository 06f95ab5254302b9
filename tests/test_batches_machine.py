"""Requests that come, are stopped, fail and end in any order: nothing lost, nobody disturbed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.core import Accepted, Delta, Finished, GenerationChunk, Message, SamplingParams
from runtime.engine import Engine
from runtime.engine_generation import Generation
from runtime.sequences import MAX_TOGETHER
from tests.batches import CHUNK_TOKENS, engine_over, load

TEXTS = ("a", "bcd", "efghijklmno", "p" * (2 * CHUNK_TOKENS + 5))
KV_TOKENS = 100


@cache
def model(purpose: str) -> Any:
    """The same weights each time; one engine at a time may run a model's experts."""
    return load("qwen3_moe", Path(mkdtemp()))


@cache
def expected(text: str, seed: int | None, most: int) -> list[int]:
    """What a request alone in a fresh engine answers."""
    with engine_over(model("alone")) as engine:
        chunks = engine.generate("alone", [Message("user", text)], params(seed, most))
        return [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]


def params(seed: int | None, most: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=most, temperature=0.0 if seed is None else 1.2, seed=seed)


class One:
    """A request and what has come of it."""

    def __init__(self, engine: Engine, name: str, text: str, seed: int | None, most: int) -> None:
        self.text, self.seed, self.most = text, seed, most
        self.stopped = self.closed = self.failing = False
        self.chunks: list[GenerationChunk] = []
        self.generation: Generation = engine.submit(
            name, [Message("user", text)], params(seed, most), lambda: self.stopped
        )

    def read(self) -> None:
        self.chunks += self.generation.take()

    def check(self) -> None:
        """Whatever happened to others: these are its own tokens, and it ends as it should."""
        ids = [i for chunk in self.chunks if isinstance(chunk, Delta) for i in chunk.token_ids]
        full = expected(self.text, self.seed, self.most)
        assert ids == full[: len(ids)]
        accepted = [chunk for chunk in self.chunks if isinstance(chunk, Accepted)]
        ends = [chunk for chunk in self.chunks if isinstance(chunk, Finished)]
        assert self.chunks[:1] == accepted
        assert self.generation.over == bool(ends or self.generation.failure)
        if ends:
            assert ends == self.chunks[-1:]
            assert ends[0].reason in (("cancelled", "length") if self.stopped else ("length",))
            assert ends[0].reason == "cancelled" or ids == full
        if self.generation.failure is not None:
            assert self.failing
            assert str(self.generation.failure) == "planted"


class Together(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.requests: list[One] = []
        self.fail_next = False
        self.opened = engine_over(model("together"), "hybrid", 4, KV_TOKENS, network=self.network)
        self.engine = self.opened.__enter__()

    def network(self, **inputs: Any) -> Any:
        output = model("together").model(**inputs)
        if self.fail_next:
            self.fail_next = False
            mine = [
                one
                for one in self.requests
                if one.generation.conversation is not None
                and one.generation.conversation.cache.past is inputs["past_key_values"]
            ]
            mine[0].failing = True
            raise ValueError("planted")
        return output

    @rule(
        name=st.sampled_from("abcd"),
        text=st.sampled_from(TEXTS),
        seed=st.sampled_from([None, 1]),
        most=st.sampled_from([1, 4, 30]),
    )
    def submit(self, name: str, text: str, seed: int | None, most: int) -> None:
        if self.engine.answering < MAX_TOGETHER + 3:
            self.requests.append(One(self.engine, name, text, seed, most))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(who=st.integers(0, 50))
    def stop(self, who: int) -> None:
        if who < len(self.requests):
            self.requests[who].stopped = True

    @rule()
    def fail(self) -> None:
        self.fail_next = True

    @rule()
    def forget(self) -> None:
        self.engine.forget()

    @invariant()
    def everything_adds_up(self) -> None:
        store = self.engine._conversations
        assert store.tokens + store.taken_tokens <= KV_TOKENS
        for one in self.requests:
            one.read()
            one.check()
        over = sum(one.generation.over for one in self.requests)
        assert over + self.engine.answering == len(self.requests)

    def teardown(self) -> None:
        self.fail_next = False
        for _ in range(1000):
            if not self.engine.answering:
                break
            self.engine.step()
        self.everything_adds_up()
        assert all(one.generation.over for one in self.requests)
        assert self.engine._conversations.taken_tokens == 0
        counters = self.engine.parts.executor.counters()
        assert counters.routed == sum(counters.served)
        self.opened.__exit__(None, None, None)


TestTogether = Together.TestCase
TestTogether.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
