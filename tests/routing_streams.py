"""A made-up model's routing, token by token, for tests of what learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.predictor_reuse import RouterView, unit_rms

LAYERS, EXPERTS, TOP_K, HIDDEN, VOCABULARY = 4, 12, 3, 24, 40


def views(seed: int = 0) -> list[RouterView]:
    """Random routers behind norms with uneven gains."""
    generator = torch.Generator().manual_seed(seed)
    return [
        RouterView(
            TOP_K,
            torch.randn(EXPERTS, HIDDEN, generator=generator),
            None,
            torch.rand(HIDDEN, generator=generator) + 0.3,
        )
        for _ in range(LAYERS)
    ]


def embedding(seed: int = 1) -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Token:
    """One token: its id (1,), per layer router inputs (1, H), choices (1, k), weights (1, k)."""

    ids: torch.Tensor
    inputs: list[torch.Tensor]
    chosen: list[torch.Tensor]
    weights: list[torch.Tensor]


def stream(
    seed: int,
    noise: float = 0.3,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Iterator[Token]:
    """Tokens whose residual is their embedding plus noise that grows from layer to layer.

    `shift` (hidden, hidden) turns the residual between layers, as experts would, and `bias`
    (experts,) leans every choice: neither is known to router reuse.
    """
    generator = torch.Generator().manual_seed(seed)
    routers, table = views(), embedding()
    while True:
        ids = torch.randint(0, VOCABULARY, (1,), generator=generator)
        residual = table[ids]
        inputs, chosen, weights = [], [], []
        for view in routers:
            residual = residual + noise * torch.randn(1, HIDDEN, generator=generator)
            if shift is not None:
                residual = residual + residual @ shift
            x = unit_rms(residual) * view.gain
            logits = x @ view.weight.T + (0.0 if bias is None else bias)
            best = logits.softmax(-1).topk(TOP_K, dim=-1)
            inputs.append(x)
            chosen.append(best.indices)
            weights.append(best.values)
        yield Token(ids, inputs, chosen, weights)
