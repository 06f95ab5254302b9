"""Routing traces of known models from statistics, for the simulator: no weights needed.

Hit rates of per-layer caches and recall of router lookahead are those of published tables
(`assets/traces/fit.py` has them); how layers, requests and batches go together is a model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.synthetic_lookahead import DISTANCES, RouterLookahead
from runtime.synthetic_routing import Floats, RoutingProcess, top_k
from runtime.synthetic_statistics import STATISTICS, Lookahead, RoutingStatistics
from runtime.trace import ForwardPass, LayerStep, Prediction, Trace

__all__ = ["STATISTICS", "Lookahead", "RoutingStatistics", "synthetic_trace"]

RECENCY_TOKENS = 64
RECENCY_HALF_LIFE = 16.0
_BLOCK_LOGITS = 2_000_000


def synthetic_trace(
    statistics: RoutingStatistics,
    *,
    seed: int,
    passes: int,
    batch: int = 1,
    prompt_tokens: int = 0,
    prompt_chunk: int = 512,
    layers: int | None = None,
    predictions: bool = True,
) -> Trace:
    """Generate `batch` chats that prefill together and then decode `passes` tokens each.

    The same seed gives the same trace; another seed gives other chats with the same model. A
    prompt's passes carry no predictions, for a chunk uses nearly every expert.

    Args:
        statistics: the model.
        seed: of the chats.
        passes: decode passes, one token of each sequence per pass.
        batch: sequences, each with its own topic.
        prompt_tokens: tokens of each prompt; 0 starts in the middle of a chat.
        prompt_chunk: tokens of each prompt that one pass takes in.
        layers: generate only the model's first layers.
        predictions: whether decode passes carry them.
    """
    count = statistics.layers if layers is None else layers
    assert 0 < count <= statistics.layers, f"{count} layers of {statistics.layers}"
    chats = _Chats(statistics, seed, batch, count)
    generated: list[ForwardPass] = []
    for start in range(0, prompt_tokens, prompt_chunk):
        generated.append(chats.prompt_pass(min(prompt_chunk, prompt_tokens - start)))
    generated += chats.decode(passes, predictions)
    origin = f"synthetic: {statistics.name}, {count} layers, batch {batch}, seed {seed}"
    return Trace((statistics.experts,) * count, statistics.top_k, origin, tuple(generated))


class _Chats:
    """The sequences of one trace, advanced together."""

    def __init__(
        self, statistics: RoutingStatistics, seed: int, sequences: int, layers: int
    ) -> None:
        self._statistics = statistics
        self._sequences = sequences
        self._layers = layers
        self._process = RoutingProcess(statistics, seed, sequences, layers)
        self._lookahead = RouterLookahead(statistics, seed, sequences, layers)

    def prompt_pass(self, tokens: int) -> ForwardPass:
        """Take in `tokens` tokens of every prompt at once."""
        demands = np.zeros((1, self._layers, self._statistics.experts), np.int64)
        recency = np.zeros(demands.shape)
        left = tokens
        for _, routed, _ in self._blocks(tokens):
            demands[0] += routed.sum(axis=(0, 1))
            ago = left - 1 - np.arange(len(routed))
            left -= len(routed)
            weight = np.where(ago < RECENCY_TOKENS, 0.5 ** (ago / RECENCY_HALF_LIFE), 0.0)
            recency[0] += np.tensordot(weight, routed.sum(axis=1), axes=1)
        (uses,) = _rows(demands)
        (recent,) = _rows(recency)
        steps = tuple(LayerStep(u, (), r) for u, r in zip(uses, recent, strict=True))
        return ForwardPass(tokens * self._sequences, steps, (), tokens)

    def decode(self, passes: int, predictions: bool) -> Iterator[ForwardPass]:
        """Generate one token of every sequence per pass."""
        for logits, routed, age in self._blocks(passes):
            uses = _rows(routed.sum(axis=1))
            none: list[_Guesses] = [{}] * len(uses)
            guesses = self._guesses(self._lookahead.guess(logits, age)) if predictions else none
            for used, guessed in zip(uses, guesses, strict=True):
                steps = tuple(
                    LayerStep(demands, _made_at(guessed, layer))
                    for layer, demands in enumerate(used)
                )
                yield ForwardPass(self._sequences, steps, _made_at(guessed, -1))

    def _blocks(self, tokens: int) -> Iterator[tuple[Floats, NDArray[np.bool_], NDArray[np.int32]]]:
        """Yield logits, choices and tokens since last use, each (tokens, sequences, layers, E)."""
        k = self._statistics.top_k
        row = self._sequences * self._layers * self._statistics.experts
        block = max(1, _BLOCK_LOGITS // row)
        for start in range(0, tokens, block):
            logits = self._process.advance(min(block, tokens - start))
            routed = np.zeros(logits.shape, np.bool_)
            np.put_along_axis(routed, top_k(logits, k), True, axis=-1)
            yield logits, routed, self._lookahead.note(routed)

    def _guesses(self, probability: Floats) -> list[_Guesses]:
        """Merge the sequences' guesses: an expert is needed unless every sequence goes without."""
        k, experts = self._statistics.top_k, self._statistics.experts
        needed = probability[:, :, 0]
        listed = 2 * k
        if self._sequences > 1:
            needed = 1.0 - np.prod(1.0 - probability, axis=2)
            listed = max(4 * k, experts // 2)
        listed = min(listed, experts)
        best = np.argsort(-needed, axis=-1, kind="stable")[..., :listed]
        scores = np.take_along_axis(needed, best, axis=-1).astype(np.float64)
        counts = (scores > 0.0).sum(axis=-1).tolist()
        found: list[_Guesses] = [{} for _ in range(needed.shape[1])]
        for index, distance in enumerate(DISTANCES):
            ranked = (best[index], scores[index], counts[index])
            for guessed, *row in zip(found, *ranked, strict=True):
                for layer, (ids, ps, count) in enumerate(zip(*row, strict=True)):
                    if layer < distance - 1:
                        continue
                    prediction = Prediction(layer, distance, ids[:count], ps[:count])
                    guessed.setdefault(layer - distance, []).append(prediction)
        return found


_Guesses = dict[int, list[Prediction]]
"""Predictions of one pass by the layer they are made at, -1 for the tokens."""


def _made_at(guessed: _Guesses, layer: int) -> tuple[Prediction, ...]:
    return tuple(guessed.get(layer, ()))


def _rows(values: NDArray[np.int64] | NDArray[np.float64]) -> list[list[dict[int, int]]]:
    """Return the positive entries of the last axis as expert -> value, per row of the others."""
    passes, layers, _ = values.shape
    positive = np.nonzero(values)
    bounds = np.concatenate(([0], np.cumsum((values > 0).sum(axis=-1).reshape(-1)))).tolist()
    experts, found = positive[2].tolist(), values[positive].tolist()
    rows = [
        dict(zip(experts[a:b], found[a:b], strict=True))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return [rows[p * layers : (p + 1) * layers] for p in range(passes)]
