"""Held-out chats read through a model once, so that predictors can be replayed on them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.adapter import attach
from runtime.adapter_cache import KvCache
from runtime.errors import ModelFilesError
from runtime.loader import LoadedModel, load_model
from runtime.predictor import Predictor
from runtime.recorder import computing_in_place

CHATS = "default_chats.json"


@dataclass(frozen=True)
class Reading:
    """One chat: `tokens` (T,), of which the first `prompt` are not decoded; per MoE layer the
    router inputs (T, hidden), choices (T, k) and weights (T, k)."""

    tokens: Tensor
    prompt: int
    inputs: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    @property
    def decoded(self) -> int:
        return len(self.tokens) - self.prompt


def open_in_place(folder: Path) -> LoadedModel:
    """Load a model on the CPU in float32, its experts where they can be computed in place."""
    return load_model(
        folder,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda step: None,
        cancelled=lambda: False,
    )


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """Return the committed chats: message lists whose last message is the right answer.

    Raises:
        ModelFilesError: the file is missing or damaged.
    """
    try:
        chats: list[list[dict[str, str]]] = json.loads(path.read_text(encoding="utf-8"))
        assert all(chat[-1]["role"] == "assistant" for chat in chats)
    except (OSError, ValueError, AssertionError, KeyError, IndexError, TypeError) as error:
        raise ModelFilesError(
            f"{path} cannot be read: {error}.", "Install the app again."
        ) from error
    return chats


def read_through(opened: LoadedModel, chats: Sequence[list[dict[str, str]]]) -> list[Reading]:
    """Read chats with their answers, each in one pass, and keep what routers saw and chose."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    run = computing_in_place(
        opened.layers, opened.store, lambda layer, *what: seen.append((what[0], what[1], what[2]))
    )
    attach(opened.layers, run)
    readings = []
    for chat in chats:
        prompt, ids = _ids(opened.tokenizer, chat[:-1], True), _ids(opened.tokenizer, chat, False)
        if ids[: len(prompt)] != prompt or not len(prompt) < len(ids) <= opened.context_tokens:
            continue  # a template that rewrites its history, or a chat that is too long
        seen.clear()
        with torch.inference_mode():
            opened.model(input_ids=torch.tensor([ids]), use_cache=False)
        inputs, chosen, weights = zip(*seen, strict=True)
        readings.append(Reading(torch.tensor(ids), len(prompt), inputs, chosen, weights))
    return readings


def share_of_a_token(
    opened: LoadedModel, predictor: Predictor, reading: Reading, tokens: int
) -> tuple[float, float]:
    """Decode with a predictor and return (its seconds, all seconds) per token, on this CPU.

    Experts are computed in place. Nothing is generated: the reading's own tokens are fed.
    """
    pending: list[Any] = []

    def launch(layer: int, x: Tensor, index: Tensor, weights: Tensor) -> None:
        pending.append(predictor.launch(layer, x, index, weights))

    attach(opened.layers, computing_in_place(opened.layers, opened.store, launch))
    cache = KvCache(opened.model.config)
    cache.expect(reading.prompt + tokens)
    parts = [reading.tokens[: reading.prompt]]
    parts += list(reading.tokens[reading.prompt : reading.prompt + tokens].split(1))  # type: ignore[no-untyped-call]
    own_s = began_s = 0.0
    for number, part in enumerate(parts):
        if number == 1:
            own_s, began_s = predictor.seconds, time.perf_counter()
        with torch.inference_mode():
            pending.append(predictor.begin_pass(part))
            out = opened.model(input_ids=part[None], past_key_values=cache.past, use_cache=True)
            for one in pending:
                one.read()
        pending.clear()
        cache.past = out.past_key_values
    steps = max(1, len(parts) - 1)
    return (predictor.seconds - own_s) / steps, (time.perf_counter() - began_s) / steps


def _ids(tokenizer: Any, messages: Sequence[dict[str, str]], open_answer: bool) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=open_answer, return_dict=False
    )
    return ids


Say = Callable[[str], None]
