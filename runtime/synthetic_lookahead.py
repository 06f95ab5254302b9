"""What the router-lookahead predictor would have guessed in a synthetic trace.

The next layers' routers see a state that is not theirs yet, so their logits are off by noise: more
for two layers than for one, more for experts that were not used lately (what a cache lacks is what
is hard to foresee), and most for layers 0 and 1, of which only the tokens tell.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.synthetic_routing import Floats
from runtime.synthetic_statistics import Lookahead, RoutingStatistics

DISTANCES = (1, 2)
COLD_TOKENS = 32
EARLY_LAYERS = 2
_CORRELATION = 0.7
_NEVER = -(10**6)


class RouterLookahead:
    """Guesses for every layer of `sequences` chats at both distances; owns when experts were used.

    A guess for a layer does not depend on how many layers are generated.
    """

    def __init__(
        self, statistics: RoutingStatistics, seed: int, sequences: int, layers: int
    ) -> None:
        self._statistics = statistics
        self._layers = [np.random.default_rng([seed, 2, layer]) for layer in range(layers)]
        self._used = np.full((sequences, layers, statistics.experts), _NEVER, np.int32)
        self._now = np.int32(0)

    def note(self, routed: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Take in (tokens, sequences, layers, experts) choices; return tokens since last use."""
        age = np.empty(routed.shape, np.int32)
        for since, row in zip(age, routed, strict=True):
            np.subtract(self._now, self._used, out=since)
            np.copyto(self._used, self._now, where=row)
            self._now += np.int32(1)
        return age

    def guess(self, logits: Floats, age: NDArray[np.int32]) -> Floats:
        """Return the probability that each expert is routed, 0 where it is not among the guesses.

        Args:
            logits: (tokens, sequences, layers, experts), the true ones.
            age: the same shape, tokens since each expert was last used.

        Returns:
            (distances, tokens, sequences, layers, experts), 2 k guesses per row at the most.
        """
        tokens, sequences, layers, experts = logits.shape
        statistics = self._statistics
        found = np.zeros((len(DISTANCES), *logits.shape), np.float32)
        cold = np.minimum(age, COLD_TOKENS).astype(np.float32) / COLD_TOKENS
        for layer, rng in enumerate(self._layers):
            off = rng.standard_normal((tokens, 2, sequences, experts), np.float32)
            farther = off[:, 1] * np.float32(np.sqrt(1.0 - _CORRELATION**2))
            farther += off[:, 0] * np.float32(_CORRELATION)
            early = layer < EARLY_LAYERS
            for index, error in enumerate((off[:, 0], farther)):
                ahead = statistics.from_tokens if early else statistics.ahead[index]
                spread = cold[:, :, layer] * np.float32(ahead.cold_noise - ahead.noise)
                spread += np.float32(ahead.noise)
                guessed = (logits[:, :, layer] + error * spread) / (1.0 + spread**2)
                found[index, :, :, layer] = _probability(guessed, ahead, statistics.top_k)
        return found


def _probability(guessed: Floats, ahead: Lookahead, k: int) -> Floats:
    """Score the 2 k largest of the last axis by their margin over the boundary behind the k-th."""
    experts = guessed.shape[-1]
    listed = min(2 * k, experts)
    ranked = np.sort(guessed, axis=-1)
    boundary = (ranked[..., experts - k] + ranked[..., max(experts - k - 1, 0)]) / 2.0
    margin = guessed - boundary[..., None]
    odds = np.clip(ahead.slope * margin + ahead.offset, -30.0, 30.0)
    score = 1.0 / (1.0 + np.exp(-odds))
    in_list = guessed >= ranked[..., experts - listed, None]
    return np.where(in_list, score, 0.0).astype(np.float32)
