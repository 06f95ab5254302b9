"""The process behind a synthetic trace: router logits of a few chats, token after token.

Topic and passage are a few numbers per chat that all layers read through weights of the model, so
what one layer does tells about the others, and so does an earlier chat on the same topic.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from runtime.synthetic_statistics import RoutingStatistics

Floats = NDArray[np.float32]
TOPIC_DIMENSIONS = 32
PASSAGE_DIMENSIONS = 64


class RoutingProcess:
    """Router logits of `sequences` independent chats with one model; owns their drift.

    Layers and experts of a model are the same for every seed, and the first layers are the same
    however many are generated.
    """

    def __init__(
        self, statistics: RoutingStatistics, seed: int, sequences: int, layers: int
    ) -> None:
        self._statistics = statistics
        model = zlib.crc32(statistics.name.encode())
        own = [np.random.default_rng([model, layer]) for layer in range(layers)]
        experts = statistics.experts

        def weights(dimensions: int, share: float) -> Floats:
            drawn = [rng.standard_normal((dimensions, experts), np.float32) for rng in own]
            scale = np.float32(np.sqrt(share / dimensions))
            return np.asarray(np.concatenate(drawn, axis=1) * scale)

        self._popularity = weights(1, statistics.popularity_share)
        self._topic = _Drift(statistics.topic_tokens, (sequences, TOPIC_DIMENSIONS))
        self._topic_weights = weights(TOPIC_DIMENSIONS, statistics.topic_share)
        self._passage = _Drift(statistics.passage_tokens, (sequences, PASSAGE_DIMENSIONS))
        self._passage_weights = weights(PASSAGE_DIMENSIONS, statistics.passage_share)
        self._phrase = _Drift(statistics.phrase_tokens, (sequences, layers, experts))
        self._chats = np.random.default_rng([seed, 0])
        self._layers = [np.random.default_rng([seed, 1, layer]) for layer in range(layers)]
        self._shape = (sequences, layers, experts)

    def advance(self, tokens: int) -> Floats:
        """Return the next `tokens` tokens' logits, (tokens, sequences, layers, experts)."""
        statistics = self._statistics
        sequences, layers, experts = self._shape
        latent = self._chats.standard_normal(
            (tokens, sequences, TOPIC_DIMENSIONS + PASSAGE_DIMENSIONS), np.float32
        )
        drawn = np.empty((tokens, 2, *self._shape), np.float32)
        for layer, rng in enumerate(self._layers):
            drawn[:, :, :, layer] = rng.standard_normal((tokens, 2, sequences, experts), np.float32)
        logits: Floats = drawn[:, 1] * np.float32(np.sqrt(statistics.token_share))
        phrase = self._phrase.advance(drawn[:, 0])
        phrase *= np.float32(np.sqrt(statistics.phrase_share))
        logits += phrase
        topic = self._topic.advance(latent[..., :TOPIC_DIMENSIONS])
        passage = self._passage.advance(latent[..., TOPIC_DIMENSIONS:])
        common = topic.reshape(-1, TOPIC_DIMENSIONS) @ self._topic_weights
        common += passage.reshape(-1, PASSAGE_DIMENSIONS) @ self._passage_weights
        common += self._popularity
        logits += common.reshape(tokens, *self._shape)
        return logits


class _Drift:
    """A first-order autoregressive process of unit variance, in place on its innovations."""

    def __init__(self, time_constant_tokens: float, shape: tuple[int, ...]) -> None:
        self._decay = np.float32(np.exp(-1.0 / time_constant_tokens))
        self._fresh = np.float32(np.sqrt(1.0 - self._decay**2))
        self._state: Floats | None = None
        self._shape = shape

    def advance(self, innovations: Floats) -> Floats:
        for row in innovations:
            if self._state is None:
                self._state = row.copy()
                continue
            row *= self._fresh
            row += self._decay * self._state
            self._state = row.copy()
        return innovations


def top_k(logits: Floats, k: int) -> NDArray[np.intp]:
    """Return the `k` largest of the last axis, in no order."""
    return np.argpartition(logits, -k, axis=-1)[..., -k:]
