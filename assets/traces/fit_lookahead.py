"""Fit how far ahead routing is known, and how sure a guess is, to published recalls.

    python -m assets.traces.fit_lookahead [MODEL ...]

prints each model's lookahead for `runtime.synthetic_statistics`. Needs the routing to be fitted
first (`assets.traces.fit`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from assets.traces.fit import nelder_mead
from runtime.synthetic_lookahead import EARLY_LAYERS, RouterLookahead
from runtime.synthetic_routing import RoutingProcess, top_k
from runtime.synthetic_statistics import STATISTICS, Lookahead, RoutingStatistics

CHATS, TOKENS, WARM, LAYERS, SEED = 2, 800, 100, 8, 11
EARLY, LATER = slice(0, EARLY_LAYERS), slice(EARLY_LAYERS, None)

Choices = NDArray[np.bool_]
Scores = NDArray[np.float32]

RECALLS = {
    "Qwen3-30B-A3B": (0.90, 0.86),
    "OLMoE": (0.80, 0.78),
    "gpt-oss-20b": (0.87, 0.80),
    "gpt-oss-120b": (0.84, 0.77),
    "Mixtral-8x7B": (0.85, 0.80),
    "DeepSeek-V2-Lite": (0.79, 0.74),
}
"""Shares of the routed set that are among the k likeliest guesses, at distances 1 and 2. Published
at distance 1, and at 2 for OLMoE; the others' second is set to lose as much as theirs do."""

FROM_TOKENS = 0.45
"""The same for layers 0 and 1, of which only the tokens tell: set. All sources agree that it is
poor; none gives a figure for the routed set."""

REFERENCE = "Qwen3-30B-A3B"
CACHE_SLOTS = 56
BESIDE_A_CACHE = (
    ((6, 0.526, 0.829), (8, 0.751, 0.680), (10, 0.867, 0.481)),
    ((6, 0.481, 0.690), (8, 0.669, 0.550), (10, 0.781, 0.400)),
)
"""The reference model beside a least recently used cache of 56 slots a layer, per distance: how
many of the likeliest guesses count, recall of the misses, precision of those not in the cache."""


@dataclass(frozen=True)
class Sample:
    """A few chats, each (tokens, chats, layers, experts). `absent` is what a cache lacks."""

    logits: NDArray[np.float32]
    routed: Choices
    age: NDArray[np.int32]
    absent: Choices


def sample(statistics: RoutingStatistics, slots: int) -> Sample:
    """Generate chats beside least recently used caches of `slots` experts per layer."""
    logits = RoutingProcess(statistics, SEED, CHATS, LAYERS).advance(TOKENS)
    routed = np.zeros(logits.shape, bool)
    np.put_along_axis(routed, top_k(logits, statistics.top_k), True, axis=-1)
    age = RouterLookahead(statistics, SEED, CHATS, LAYERS).note(routed)
    oldest_held = np.sort(age, axis=-1)[..., slots - 1, None]
    return Sample(logits, routed, age, age > oldest_held)


def guessed(
    statistics: RoutingStatistics, drawn: Sample, noise: float, cold: float, index: int
) -> Scores:
    """Return the guesses' scores at the distance of `index`, 0 where none; slope 1, offset 0."""
    ahead = Lookahead(noise, cold, 1.0, 0.0)
    tried = replace(statistics, ahead=(ahead, ahead), from_tokens=ahead)
    lookahead = RouterLookahead(tried, SEED, CHATS, LAYERS)
    return np.asarray(lookahead.guess(drawn.logits, drawn.age)[index])


def among(scores: Scores, listed: int) -> Choices:
    """Return which experts are among the `listed` likeliest."""
    return np.asarray((scores >= np.sort(scores, axis=-1)[..., -listed, None]) & (scores > 0.0))


def share(found: Choices, wanted: Choices, part: slice) -> float:
    """Return the share of `wanted` that was found in some of the layers."""
    seen = wanted[WARM:, :, part]
    return float((found[WARM:, :, part] & seen).sum() / seen.sum())


def noise_beside_a_cache(statistics: RoutingStatistics, index: int) -> tuple[float, float]:
    """Return noise and cold noise at one distance, fitted to the guesses beside a cache.

    Not all of it can be met at once; recall counts double.
    """
    drawn = sample(statistics, CACHE_SLOTS)
    missed = drawn.routed & drawn.absent

    def misfit(x: NDArray[np.float64]) -> float:
        noise, cold = np.exp(x).tolist()
        scores = guessed(statistics, drawn, noise, cold, index)
        routed = share(among(scores, statistics.top_k), drawn.routed, LATER)
        off = [2.0 * (routed - RECALLS[statistics.name][index])]
        for listed, recall, precision in BESIDE_A_CACHE[index]:
            likeliest = among(scores, listed)
            off.append(2.0 * (share(likeliest, missed, LATER) - recall))
            off.append(share(missed, likeliest & drawn.absent, LATER) - precision)
        return float(np.sum(np.square(off)))

    x = nelder_mead(misfit, np.log(np.array([0.1, 0.25])), 0.3, 50)
    noise, cold = np.exp(x).tolist()
    return noise, cold


def noise_for(
    statistics: RoutingStatistics, drawn: Sample, ratio: float, index: int, part: slice, goal: float
) -> float:
    """Bisect for the noise at which `goal` of the routed set is among the k likeliest."""
    low, high = 0.0, 4.0
    for _ in range(11):
        noise = (low + high) / 2.0
        scores = guessed(statistics, drawn, noise, noise * ratio, index)
        above = share(among(scores, statistics.top_k), drawn.routed, part) > goal
        low, high = (noise, high) if above else (low, noise)
    return noise


def calibrated(scores: Scores, routed: Choices) -> tuple[float, float]:
    """Fit the logistic's slope and offset to hits among the guesses (Newton's method)."""
    listed = scores > 0.0
    p = np.clip(scores[listed].astype(np.float64), 1e-9, 1.0 - 1e-9)
    features = np.stack([np.log(p / (1.0 - p)), np.ones(len(p))], axis=1)
    x = np.array([1.0, 0.0])
    for _ in range(30):
        expected = 1.0 / (1.0 + np.exp(-features @ x))
        curvature = (features * (expected * (1.0 - expected))[:, None]).T @ features
        x = x + np.linalg.solve(curvature, features.T @ (routed[listed] - expected))
    return round(float(x[0]), 2), round(float(x[1]), 2)


def fit(
    statistics: RoutingStatistics,
    drawn: Sample,
    noise: float,
    cold: float,
    index: int,
    part: slice = LATER,
) -> Lookahead:
    """Return a lookahead that knows how sure it is, and print the recalls that come with it."""
    scores = guessed(statistics, drawn, noise, cold, index)
    missed = drawn.routed & drawn.absent
    for listed in (statistics.top_k, 2 * statistics.top_k):
        likeliest = among(scores, listed)
        figures = [
            share(likeliest, drawn.routed, part),
            share(likeliest, missed, part),
            share(missed, likeliest & drawn.absent, part),
        ]
        print(f"  # top {listed}: routed, misses, precision {np.round(figures, 3).tolist()}")
    slope, offset = calibrated(scores[WARM:, :, part], drawn.routed[WARM:, :, part])
    return Lookahead(round(noise, 3), round(cold, 3), slope, offset)


def main() -> None:
    reference = STATISTICS[REFERENCE]
    known = [noise_beside_a_cache(reference, index) for index in (0, 1)]
    for name in sys.argv[1:] or RECALLS:
        statistics, goals = STATISTICS[name], RECALLS[name]
        slots = CACHE_SLOTS if name == REFERENCE else statistics.experts // 4
        drawn = sample(statistics, slots)
        ahead = []
        for index, (noise, cold) in enumerate(known):
            ratio = cold / noise
            if name != REFERENCE:
                noise = noise_for(statistics, drawn, ratio, index, LATER, goals[index])
            ahead.append(fit(statistics, drawn, noise, noise * ratio, index))
        blind = noise_for(statistics, drawn, 1.0, 0, EARLY, FROM_TOKENS)
        from_tokens = fit(statistics, drawn, blind, blind, 0, EARLY)
        print(name, tuple(ahead), from_tokens, flush=True)


if __name__ == "__main__":
    main()
