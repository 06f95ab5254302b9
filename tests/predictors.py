"""Predictors of the made-up routing: what they guess, how well, and heads to give them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from runtime import predictor_files
from runtime.predictor import Predictor
from runtime.predictor_heads import Head, Heads, Packed, Tables, pack
from runtime.predictor_open import LearningPredictor
from runtime.predictor_reuse import folded, folded_from_residual, unit_rms
from runtime.trace import Prediction
from tests.routing_streams import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOP_K,
    VOCABULARY,
    Token,
    embedding,
    stream,
    views,
)

INNER, WIDTH = 6, 6 + 2 * EXPERTS


def guesses(predictor: Predictor, token: Token) -> list[Prediction]:
    """Run one token through a predictor as the executor would."""
    made = list(predictor.begin_pass(token.ids).read())
    for layer in range(LAYERS):
        pending = predictor.launch(
            layer, token.inputs[layer], token.chosen[layer], token.weights[layer]
        )
        made += pending.read()
    return made


def recalls(predictor: Predictor, tokens: list[Token]) -> dict[int, float]:
    """Mean recall at k per distance, of targets guessed from a layer."""
    met: dict[int, list[float]] = {1: [], 2: []}
    for token in tokens:
        for made in guesses(predictor, token):
            if made.layer >= made.distance:
                wanted = set(token.chosen[made.layer][0].tolist())
                best = {guess.expert for guess in made.guesses[:TOP_K]}
                met[made.distance].append(len(wanted & best) / TOP_K)
    return {distance: sum(values) / len(values) for distance, values in met.items()}


def many(seed: int, count: int, **options: torch.Tensor) -> list[Token]:
    return list(islice(stream(seed, **options), count))  # type: ignore[arg-type]


def learner(
    folder: Path | None = None, shipped: Path | None = None, seed: int = 0
) -> LearningPredictor:
    return LearningPredictor(views(seed), embedding(), torch.float32, shipped, folder)


def heads_that_reuse(
    scale: float = 1.0, noise: float = 0.0, lean: torch.Tensor | None = None
) -> Heads:
    """Heads that score as router reuse does, times `scale`, plus noise and a lean (experts,)."""
    routers, generator = views(), torch.Generator().manual_seed(9)
    places = []
    for place in range(LAYERS):
        first = torch.zeros(WIDTH, HIDDEN)
        for distance in (1, 2):
            target = place + distance - 1
            if place and target < LAYERS:
                rows = slice(INNER + (distance - 1) * EXPERTS, INNER + distance * EXPERTS)
                first[rows] = folded(routers[place - 1], routers[target]) * scale
        first[INNER:] += noise * torch.randn(2 * EXPERTS, HIDDEN, generator=generator)
        places.append(
            Head(
                compress=torch.eye(HIDDEN, dtype=torch.int8),
                first=pack(first),
                second=Packed(
                    torch.zeros(2 * EXPERTS, INNER, dtype=torch.int8), torch.ones(2 * EXPERTS)
                ),
                routed=torch.zeros(EXPERTS, WIDTH).half() if place else None,
                gate=None,
                inner=None,
            )
        )
    token = torch.zeros(VOCABULARY, LAYERS, WIDTH)
    rows = unit_rms(embedding())
    for distance in (1, 2):
        columns = slice(INNER + (distance - 1) * EXPERTS, INNER + distance * EXPERTS)
        token[:, 0, columns] = rows @ folded_from_residual(routers[distance - 1]).T * scale
    bias = torch.zeros(LAYERS, WIDTH)
    if lean is not None:
        bias[:, INNER:] = lean.repeat(2)
    tables = Tables(
        token.half(),
        torch.zeros(VOCABULARY, WIDTH).half(),
        bias,
        torch.zeros(LAYERS, EXPERTS, 2, WIDTH).half(),
        4.0,
    )
    return Heads(tuple(places), tables, EXPERTS, TOP_K)


def ship(folder: Path, heads: Heads, *, reuse: float, learned: float) -> Path:
    """Write heads as files that claim these recalls."""
    entries = [
        {
            "layer": place + distance - 1,
            "distance": distance,
            "reuse_recall": reuse,
            "learned_recall": learned,
            "reuse_curve": [1.0, 0.0],
            "learned_curve": [1.0, 0.0],
        }
        for place in range(LAYERS)
        for distance in (1, 2)
        if place + distance - 1 < LAYERS
    ]
    facts = {
        "fingerprint": predictor_files.fingerprint(views()),
        "top_k": TOP_K,
        "half_life_tokens": 4.0,
        "slots": entries,
    }
    predictor_files.write(folder, predictor_files.SHIPPED_NAME, heads.tensors(), facts)
    return folder
