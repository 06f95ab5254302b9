"""From scores of experts to guesses: the likeliest few per target, with calibrated probabilities.

How far a score lies above or below the boundary between the k-th and the next expert says how
sure the choice is; a logistic curve per (layer, distance) turns that margin into a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.trace import Prediction, Scores

MIN_PROBABILITY = 0.02
"""Where several tokens are merged, less likely experts are not worth a guess."""

_EXPONENT_MAX = 60.0


@dataclass(frozen=True)
class Curve:
    """Probability of being routed = sigmoid(slope * margin + offset)."""

    slope: float
    offset: float

    def at(self, margins: Scores) -> Scores:
        """Return the probabilities at several margins."""
        exponents = np.minimum(_EXPONENT_MAX, -self.slope * margins - self.offset)
        return np.asarray(1.0 / (1.0 + np.exp(exponents)))


@dataclass(frozen=True)
class Ranked:
    """The best experts of every target, still on the device.

    `flat` is one vector: per target its values, then per target its experts. Values are scores if
    `probabilities` is False (one token), else the probability that a token needs the expert.
    """

    flat: Tensor
    counts: tuple[int, ...]
    probabilities: bool


def rank(scores: Sequence[Tensor], top_ks: Sequence[int], curves: Sequence[Curve]) -> Ranked:
    """Keep the best 2k experts per target and token; `scores` are (tokens, experts) per target."""
    tokens = scores[0].shape[0]
    counts = tuple(
        min(one.shape[1], 2 * top_k * tokens) for one, top_k in zip(scores, top_ks, strict=True)
    )
    if tokens > 1:
        scores = [
            _any_token(one, top_k, curve).unsqueeze(0)
            for one, top_k, curve in zip(scores, top_ks, curves, strict=True)
        ]
    best = [one[0].float().topk(count) for one, count in zip(scores, counts, strict=True)]
    flat = torch.cat([b.values for b in best] + [b.indices.float() for b in best])
    return Ranked(flat, counts, tokens > 1)


def rank_alike(scores: Tensor, top_k: int) -> Ranked:
    """`rank` for one token and targets of equal size: `scores` is (targets, experts) in float32."""
    count = min(scores.shape[1], 2 * top_k)
    values, experts = scores.topk(count)
    flat = torch.cat((values, experts.to(values.dtype))).view(-1)
    return Ranked(flat, (count,) * scores.shape[0], False)


def predictions_from(
    ranked: Ranked,
    targets: Sequence[tuple[int, int]],
    top_ks: Sequence[int],
    curves: Sequence[Curve],
    flat: Tensor | None = None,
) -> tuple[Prediction, ...]:
    """Return what `rank` chose; `targets` are (layer, distance), `flat` is `ranked.flat` as the
    host has read it already, None: it is fetched now."""
    numbers = (ranked.flat if flat is None else flat).cpu().double().numpy()
    made, begin, half = [], 0, len(numbers) // 2
    for (layer, distance), top_k, curve, count in zip(
        targets, top_ks, curves, ranked.counts, strict=True
    ):
        values = numbers[begin : begin + count]
        experts = numbers[half + begin : half + begin + count].astype(np.int64)
        begin += count
        if ranked.probabilities:
            likely = int((values > MIN_PROBABILITY).sum())  # the likeliest come first
            made.append(Prediction(layer, distance, experts[:likely], values[:likely]))
        else:
            margins = values - _boundary(values, top_k)
            made.append(Prediction(layer, distance, experts, curve.at(margins)))
    return tuple(made)


def _boundary(values: Scores, top_k: int) -> float:
    """The middle between the k-th and the next of values in falling order."""
    return float((values[top_k - 1] + values[min(top_k, len(values) - 1)]) / 2)


def margins(scores: Tensor, top_k: int) -> Tensor:
    """Return scores (tokens, experts) less each token's boundary."""
    best = scores.topk(min(top_k + 1, scores.shape[1]), dim=-1).values
    edge = (best[:, top_k - 1] + best[:, -1]) / 2
    return scores - edge.unsqueeze(1)


def _any_token(scores: Tensor, top_k: int, curve: Curve) -> Tensor:
    """Return (experts,): the probability that at least one of the tokens needs each."""
    each = torch.sigmoid(margins(scores.float(), top_k) * curve.slope + curve.offset)
    return 1.0 - (1.0 - each).prod(dim=0)
