"""What the predictor of expert activation learns from: chats read through the model, with routing.

Two sources: training chats read token by token at once, and answers that the model generated
itself. Every row is one token with all its layers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from assets.training.corpus import CLASSES, Dialog, dialog, draw, evaluation_item
from assets.training.evaluate import answer_all, messages
from assets.training.tokens import MAX_TOKENS, render

HELD_OUT_SEED = 77


@dataclass(frozen=True)
class Routing:
    """Rows in order: `inputs` (rows, layers, hidden) half, `chosen` (rows, layers, k), `weights`
    alike in half, `tokens` (rows,), `starts` (rows,) true where a chat begins."""

    inputs: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, begin: int, end: int | None = None) -> Routing:
        """A stretch of rows."""
        fields = (self.inputs, self.chosen, self.weights, self.tokens, self.starts)
        return Routing(*(field[begin:end] for field in fields))


def joined(parts: list[Routing]) -> Routing:
    """Several recordings one after another."""
    names = ("inputs", "chosen", "weights", "tokens", "starts")
    return Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def training_chats(seed: int) -> Iterator[Dialog]:
    """Endless chats of the training side of the split."""
    rng = random.Random(seed)
    while True:
        yield dialog(rng)


def held_out_chats(seed: int = HELD_OUT_SEED) -> Iterator[Dialog]:
    """Endless chats made of held-out questions and their right answers."""
    rng = random.Random(seed)
    tasks = [task for group in CLASSES.values() for task in group]
    while True:
        turns: Dialog = []
        for _ in range(rng.randint(1, 3)):
            item = evaluation_item(rng, tasks[rng.randrange(len(tasks))])
            turns += [(message["role"], message["content"]) for message in messages(item)]
            turns.append(("assistant", item.answer))
        yield turns


def answered_chats(model, tokenizer, seed: int, batch: int = 48) -> Iterator[Dialog]:
    """Endless training chats with the answers that the model itself generates, right or wrong."""
    rng = random.Random(seed)
    while True:
        items = [draw(rng) for _ in range(batch)]
        asked = [messages(item) for item in items]
        for chat, (text, _) in zip(asked, answer_all(model, tokenizer, asked), strict=True):
            turns = [(message["role"], message["content"]) for message in chat]
            yield [*turns, ("assistant", text)]


@torch.no_grad()
def read_chats(model, tokenizer, chats: Iterable[Dialog], tokens: int) -> Routing:
    """Read chats through the model, each from its own beginning, until there are `tokens` rows."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    seen: list = []
    hooks = [r.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for r in routers]
    parts, rows = [], 0
    try:
        for turns in chats:
            ids = tokenizer(render(turns), return_tensors="pt").input_ids[:, : MAX_TOKENS - 24]
            seen.clear()
            model.model(input_ids=ids, use_cache=False)
            starts = torch.zeros(ids.shape[1], dtype=torch.bool)
            starts[0] = True
            parts.append(
                Routing(
                    torch.stack([x.view(-1, x.shape[-1]) for x, _ in seen], 1).half(),
                    torch.stack([out[2] for _, out in seen], 1),
                    torch.stack([out[1] for _, out in seen], 1).half(),
                    ids[0],
                    starts,
                )
            )
            rows += ids.shape[1]
            if rows >= tokens:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return joined(parts)
