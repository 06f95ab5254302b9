"""An engine over a tiny random model, requests for it together or alone, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach, detach
from runtime.adapter_cache import KvCache
from runtime.core import Accepted, Delta, Finished, MemoryPlan, Message, SamplingParams
from runtime.device_emulated import EmulatedDevice
from runtime.engine import Engine
from runtime.engine_generation import Generation
from runtime.engine_parts import EngineParts
from runtime.executor import Executor
from runtime.loader import LoadedModel, load_model
from runtime.sampler import Sampler
from tests.families import make_checkpoint
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


def models_made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
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
