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
    that drift. `ahead` is the lookahead per distance, 1 first; `from_tokens` is for guesses that
    see no layer yet.
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
            0.0724, 0.2055, 3153.99, 0.0474, 87.72, 0.5605, 2.23,
            (Lookahead(0.228, 0.569, 6.05, -0.31), Lookahead(0.276, 0.59, 5.34, -0.34)),
            Lookahead(1.181, 1.181, 2.05, -0.83),
        ),
        RoutingStatistics(
            "gpt-oss-20b", 24, 32, 4,
            0.1102, 0.098, 1507.09, 0.2841, 62.19, 0.2337, 2.47,
            (Lookahead(0.124, 0.31, 11.84, -0.17), Lookahead(0.224, 0.477, 6.91, -0.27)),
            Lookahead(1.216, 1.216, 2.17, -0.84),
        ),
        RoutingStatistics(
            "gpt-oss-120b", 36, 128, 4,
            0.1476, 0.192, 1291.48, 0.1922, 58.65, 0.1805, 2.25,
            (Lookahead(0.095, 0.237, 12.69, -0.26), Lookahead(0.163, 0.348, 8.0, -0.38)),
            Lookahead(0.722, 0.722, 2.68, -0.95),
        ),
        RoutingStatistics(
            "Qwen3-30B-A3B", 48, 128, 8,
            0.0764, 0.1988, 637.85, 0.3264, 93.79, 0.1315, 1.98,
            (Lookahead(0.075, 0.188, 16.7, -0.15), Lookahead(0.122, 0.26, 11.08, -0.22)),
            Lookahead(0.901, 0.901, 2.38, -0.94),
        ),
        RoutingStatistics(
            "Mixtral-8x7B", 32, 8, 2,
            0.0259, 0.01, 4028.51, 0.0506, 82.38, 0.7424, 0.83,
            (Lookahead(0.206, 0.515, 8.99, -0.14), Lookahead(0.306, 0.652, 6.15, -0.18)),
            Lookahead(1.927, 1.927, 1.82, -0.65),
        ),
        RoutingStatistics(
            "DeepSeek-V2-Lite", 26, 64, 6,
            0.0085, 0.0422, 1537.63, 0.0822, 145.27, 0.5432, 1.41,
            (Lookahead(0.192, 0.481, 6.61, -0.35), Lookahead(0.271, 0.577, 5.13, -0.41)),
            Lookahead(1.007, 1.007, 2.23, -0.9),
        ),
    )
}  # fmt: skip
