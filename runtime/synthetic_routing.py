"""The process behind a synthetic trace: router logits of a few chats, token after token.

Topic and passage are directions that a chat drifts through and that all layers read through the
model's own weights, so what one layer does tells about the others, and so does an earlier chat
from the same domain.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from runtime.synthetic_statistics import RoutingStatistics

Floats = NDArray[np.float32]
TOPIC_DIMENSIONS = 32
PASSAGE_DIMENSIONS = 64
DOMAINS = 16
DOMAIN_SHARE = 0.5
_GOLDEN = (5.0**0.5 - 1.0) / 2.0


class RoutingProcess:
    """Router logits of `sequences` independent chats with one model; owns their drift.

    Layers and experts of a model are the same for every seed, and the first layers are the same
    however many are generated.
    """

    def __init__(
        self, statistics: RoutingStatistics, seed: int, sequences: int, layers: int
    ) -> None:
        self._weights = _ModelWeights(statistics, layers)
        self._topic = _Drift(statistics.topic_tokens)
        self._passage = _Drift(statistics.passage_tokens)
        self._phrase = _Drift(statistics.phrase_tokens)
        self._chats = np.random.default_rng([seed, 0])
        self._layers = [np.random.default_rng([seed, 1, layer]) for layer in range(layers)]
        self._shape = (sequences, layers, statistics.experts)
        domain = self._weights.domains[self._chats.integers(DOMAINS, size=sequences)]
        own = self._chats.standard_normal(domain.shape, np.float32)
        self._topic.start(DOMAIN_SHARE**0.5 * domain + (1.0 - DOMAIN_SHARE) ** 0.5 * own)

    def advance(self, tokens: int) -> Floats:
        """Return the next `tokens` tokens' logits, (tokens, sequences, layers, experts)."""
        sequences, _, experts = self._shape
        weights = self._weights
        latent = self._chats.standard_normal(
            (tokens, sequences, TOPIC_DIMENSIONS + PASSAGE_DIMENSIONS), np.float32
        )
        drawn = np.empty((tokens, 2, *self._shape), np.float32)
        for layer, rng in enumerate(self._layers):
            drawn[:, :, :, layer] = rng.standard_normal((tokens, 2, sequences, experts), np.float32)
        logits: Floats = drawn[:, 1] * weights.token
        phrase = self._phrase.advance(drawn[:, 0])
        phrase *= weights.phrase
        logits += phrase
        topic = _directions(self._topic.advance(latent[..., :TOPIC_DIMENSIONS]))
        passage = _directions(self._passage.advance(latent[..., TOPIC_DIMENSIONS:]))
        lasting = topic.reshape(-1, TOPIC_DIMENSIONS) @ weights.topic
        lasting += passage.reshape(-1, PASSAGE_DIMENSIONS) @ weights.passage
        lasting += weights.popularity
        logits += lasting.reshape(logits.shape)
        return logits


class _ModelWeights:
    """How the first `layers` layers of a model read a chat: per column, (layer, expert) in order.

    `phrase` and `token` are (layers, 1). The lasting parts' share of a layer's variance varies
    from layer to layer by `layer_spread` to either side, in log odds; a golden-ratio sequence
    spreads any first few layers evenly.
    """

    def __init__(self, statistics: RoutingStatistics, layers: int) -> None:
        model = zlib.crc32(statistics.name.encode())
        experts = statistics.experts
        lasting = 1.0 - statistics.phrase_share - statistics.token_share
        place = 2.0 * (np.arange(1, layers + 1) * _GOLDEN % 1.0) - 1.0
        odds = lasting / (1.0 - lasting) * np.exp(statistics.layer_spread * place)
        more, less = odds / (1.0 + odds) / lasting, 1.0 / (1.0 + odds) / (1.0 - lasting)
        own = [np.random.default_rng([model, layer]) for layer in range(layers)]

        def loadings(dimensions: int, share: float) -> Floats:
            drawn = [rng.standard_normal((dimensions, experts), np.float32) for rng in own]
            scale = np.sqrt(share * more / dimensions).astype(np.float32)
            return np.concatenate([d * s for d, s in zip(drawn, scale, strict=True)], axis=1)

        self.popularity = loadings(1, statistics.popularity_share)
        self.topic = loadings(TOPIC_DIMENSIONS, statistics.topic_share)
        self.passage = loadings(PASSAGE_DIMENSIONS, statistics.passage_share)
        self.phrase = np.sqrt(statistics.phrase_share * less).astype(np.float32)[:, None]
        self.token = np.sqrt(statistics.token_share * less).astype(np.float32)[:, None]
        self.domains = np.random.default_rng([model]).standard_normal(
            (DOMAINS, TOPIC_DIMENSIONS), np.float32
        )


class _Drift:
    """A first-order autoregressive process of unit variance, in place on its innovations."""

    def __init__(self, time_constant_tokens: float) -> None:
        self._decay = np.float32(np.exp(-1.0 / time_constant_tokens))
        self._fresh = np.float32(np.sqrt(1.0 - self._decay**2))
        self._state: Floats | None = None

    def start(self, state: Floats) -> None:
        """Begin at `state` and not just anywhere."""
        self._state = state.astype(np.float32)

    def advance(self, innovations: Floats) -> Floats:
        for row in innovations:
            if self._state is not None:
                row *= self._fresh
                row += self._decay * self._state
            self._state = row
        if self._state is not None:
            self._state = self._state.copy()
        return innovations


def _directions(vectors: Floats) -> Floats:
    """Scale to mean square 1: a topic may be another one, but no chat has more of it."""
    square = np.mean(vectors**2, axis=-1, keepdims=True)
    return np.asarray(vectors / np.sqrt(square))


def top_k(logits: Floats, k: int) -> NDArray[np.intp]:
    """Return the `k` largest of the last axis, in no order."""
    return np.argpartition(logits, -k, axis=-1)[..., -k:]
