"""How the routing of known models behaves, as the parameters of a generator of such routing.

Fitted to published cache replays by `assets/traces/fit.py`, which prints these rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookahead:
    """How well a layer's router logits are known ahead of it.

    The guess is what is to be expected of a logit seen through Gaussian noise: `noise` deviations
    of the logits' own for an expert just used, `cold_noise` for one not used lately. A guess
    `margin` logits above the boundary between the k-th and the next guess is right with
    probability 1 / (1 + exp(-(slope * margin + offset))).
    """

    noise: float
    cold_noise: float
    slope: float
    offset: float


@dataclass(frozen=True)
class RoutingStatistics:
    """Shape of a model and the process its router logits follow, layer by layer.

    A logit is a sum of independent parts of unit variance in all: what the model always likes
    (`popularity`), the topic, the passage, the words around, and the token itself. `*_share` are
    variances, which add up to 1 with the token's; `*_tokens` are the time constants of the three
    that drift. Layers differ by up to `layer_spread` in how much lasts (`synthetic_routing`).
    `ahead` is the lookahead per distance, 1 first; `from_tokens` is for guesses that see no layer
    yet.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    popularity_share: float
    topic_share: float
    topic_tokens: float
    passage_share: float
    passage_tokens: float
    phrase_share: float
    phrase_tokens: float
    layer_spread: float
    ahead: tuple[Lookahead, Lookahead]
    from_tokens: Lookahead

    @property
    def token_share(self) -> float:
        drifting = self.topic_share + self.passage_share + self.phrase_share
        return 1.0 - self.popularity_share - drifting


STATISTICS: dict[str, RoutingStatistics] = {
    statistics.name: statistics
    for statistics in (
        RoutingStatistics(
            "OLMoE", 16, 64, 8,
            0.128, 0.239, 3530.31, 0.016, 115.11, 0.444, 1.27, 2.28,
            (Lookahead(0.244, 0.528, 6.07, -0.29), Lookahead(0.287, 0.537, 5.42, -0.32)),
            Lookahead(1.205, 1.205, 2.16, -0.87),
        ),
        RoutingStatistics(
            "gpt-oss-20b", 24, 32, 4,
            0.135, 0.147, 2452.53, 0.197, 140.01, 0.228, 2.57, 1.0,
            (Lookahead(0.131, 0.283, 11.93, -0.16), Lookahead(0.229, 0.427, 6.9, -0.27)),
            Lookahead(1.092, 1.092, 2.03, -0.81),
        ),
        RoutingStatistics(
            "gpt-oss-120b", 36, 128, 4,
            0.098, 0.25, 2170.93, 0.129, 139.65, 0.141, 4.15, 0.48,
            (Lookahead(0.107, 0.232, 12.33, -0.26), Lookahead(0.182, 0.34, 7.73, -0.38)),
            Lookahead(0.693, 0.693, 2.75, -0.96),
        ),
        RoutingStatistics(
            "Qwen3-30B-A3B", 48, 128, 8,
            0.046, 0.286, 1260.2, 0.241, 149.77, 0.15, 3.1, 0.7,
            (Lookahead(0.095, 0.205, 14.52, -0.18), Lookahead(0.151, 0.281, 9.74, -0.26)),
            Lookahead(0.912, 0.912, 2.45, -0.96),
        ),
        RoutingStatistics(
            "Mixtral-8x7B", 32, 8, 2,
            0.021, 0.008, 3877.6, 0.044, 84.76, 0.787, 0.81, 1.0,
            (Lookahead(0.221, 0.477, 8.66, -0.13), Lookahead(0.322, 0.602, 5.94, -0.18)),
            Lookahead(1.842, 1.842, 1.94, -0.65),
        ),
        RoutingStatistics(
            "DeepSeek-V2-Lite", 26, 64, 6,
            0.0085, 0.0422, 1537.63, 0.0822, 145.27, 0.5432, 1.41, 1.0,
            (Lookahead(0.209, 0.452, 6.59, -0.33), Lookahead(0.283, 0.529, 5.22, -0.39)),
            Lookahead(1.006, 1.006, 2.24, -0.9),
        ),
    )
}  # fmt: skip
