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

TOKENS, LAYERS, SEED = 1000, 6, 11
FROM_TOKENS = 0.45
REFERENCE = "Qwen3-30B-A3B"


Rows = tuple[tuple[int, float, float], ...]

RECALLS = {
    "Qwen3-30B-A3B": (0.90, 0.86),
    "OLMoE": (0.80, 0.78),
    "gpt-oss-20b": (0.87, 0.80),
    "gpt-oss-120b": (0.84, 0.77),
    "Mixtral-8x7B": (0.85, 0.80),
    "DeepSeek-V2-Lite": (0.79, 0.74),
}
"""Shares of the routed set that are among the k likeliest guesses, at distances 1 and 2."""

CACHE_SLOTS = 56
BESIDE_A_CACHE: tuple[Rows, Rows] = (
    ((6, 0.526, 0.829), (8, 0.751, 0.680), (10, 0.867, 0.481)),
    ((6, 0.481, 0.690), (8, 0.669, 0.550), (10, 0.781, 0.400)),
)
"""Qwen3-30B-A3B beside a least recently used cache of 56 slots a layer, per distance: how many of
the likeliest guesses are looked at, recall of the misses, precision of those not in the cache."""


@dataclass(frozen=True)
class Sample:
    """Logits and choices of one chat, and what a cache of `slots` experts per layer lacks."""

    logits: NDArray[np.float32]
    routed: NDArray[np.bool_]
    missed: NDArray[np.bool_]
    absent: NDArray[np.bool_]


def sample(statistics: RoutingStatistics, slots: int) -> Sample:
    """Generate (tokens, 1, layers, experts) of each."""
    logits = RoutingProcess(statistics, SEED, 1, LAYERS).advance(TOKENS)
    routed = np.zeros(logits.shape, bool)
    np.put_along_axis(routed, top_k(logits, statistics.top_k), True, axis=-1)
    age = RouterLookahead(statistics, SEED, 1, LAYERS).note(routed)
    recent = np.sort(age, axis=-1)[..., slots - 1, None]
    return Sample(logits, routed, routed & (age > recent), age > recent)


def guesses(
    statistics: RoutingStatistics, drawn: Sample, ahead: tuple[Lookahead, Lookahead], early: bool
) -> NDArray[np.float32]:
    """Return probabilities, (distances, tokens, 1, layers, experts), of early or later layers."""
    tried = replace(statistics, ahead=ahead, from_tokens=ahead[0])
    lookahead = RouterLookahead(tried, SEED, 1, LAYERS)
    found = lookahead.guess(drawn.logits, lookahead.note(drawn.routed))
    return found[..., :EARLY_LAYERS, :] if early else found[..., EARLY_LAYERS:, :]


def recall(
    wanted: NDArray[np.bool_], probability: NDArray[np.float32], listed: int
) -> NDArray[np.float64]:
    """Return, per distance, the share of `wanted` among the `listed` likeliest."""
    likeliest = np.sort(probability, axis=-1)[..., -listed, None]
    found = wanted & (probability >= likeliest) & (probability > 0.0)
    return np.asarray(found.sum(axis=(1, 2, 3, 4)) / wanted.sum())


def with_noise(
    statistics: RoutingStatistics, drawn: Sample, ratio: float, goal: float, index: int, early: bool
) -> tuple[Lookahead, NDArray[np.float32]]:
    """Bisect for the noise that gives a routed recall of `goal` at k; return it and its guesses."""
    low, high = 0.0, 4.0
    part = slice(0, EARLY_LAYERS) if early else slice(EARLY_LAYERS, None)
    wanted = drawn.routed[:, :, part]
    for _ in range(12):
        middle = (low + high) / 2.0
        ahead = Lookahead(middle, middle * ratio, 1.0, 0.0)
        found = guesses(statistics, drawn, (ahead, ahead), early)
        above = recall(wanted, found, statistics.top_k)[index] > goal
        low, high = (middle, high) if above else (low, middle)
    return ahead, found[index]


def calibrated(
    ahead: Lookahead, probability: NDArray[np.float32], routed: NDArray[np.bool_]
) -> Lookahead:
    """Fit the logistic's slope and offset to hits among the guesses (Newton's method)."""
    listed = probability > 0.0
    p = np.clip(probability[listed].astype(np.float64), 1e-9, 1.0 - 1e-9)
    features = np.stack([np.log(p / (1.0 - p)), np.ones(len(p))], axis=1)
    hit = routed[listed]
    x = np.array([1.0, 0.0])
    for _ in range(30):
        score = 1.0 / (1.0 + np.exp(-features @ x))
        curvature = (features * (score * (1.0 - score))[:, None]).T @ features
        x = x + np.linalg.solve(curvature, features.T @ (hit - score))
    noise, cold = round(ahead.noise, 3), round(ahead.cold_noise, 3)
    return Lookahead(noise, cold, round(float(x[0]), 2), round(float(x[1]), 2))


def ratios(statistics: RoutingStatistics) -> list[float]:
    """Return cold noise over noise per distance, fitted to the guesses beside a cache."""
    drawn = sample(statistics, CACHE_SLOTS)
    part = slice(EARLY_LAYERS, None)
    missed, routed = drawn.missed[:, :, part], drawn.routed[:, :, part]
    absent = drawn.absent[:, :, part]
    found = []
    for index, rows in enumerate(BESIDE_A_CACHE):

        def misfit(x: NDArray[np.float64], index: int = index, rows: Rows = rows) -> float:
            noise, cold = np.exp(x)
            ahead = Lookahead(noise, cold, 1.0, 0.0)
            guessed = guesses(statistics, drawn, (ahead, ahead), False)[index, None]
            goal = RECALLS[statistics.name][index]
            off = 2.0 * (recall(routed, guessed, statistics.top_k)[0] - goal)
            total = float(off**2)
            for listed, recalled, precise in rows:
                likeliest = np.sort(guessed, axis=-1)[..., -listed, None]
                issued = (guessed >= likeliest)[0] & absent
                hits = float((issued & missed).sum())
                total += (hits / missed.sum() - recalled) ** 2 + (
                    hits / issued.sum() - precise
                ) ** 2
            return total

        x = nelder_mead(misfit, np.log(np.array([0.1, 0.25])), 0.3, 60)
        found.append(float(np.exp(x[1] - x[0])))
    return found


def fit(statistics: RoutingStatistics, ratio: list[float]) -> RoutingStatistics:
    """Return `statistics` with its lookahead fitted; print the recalls that come with it."""
    known = RECALLS[statistics.name]
    slots = CACHE_SLOTS if statistics.name == REFERENCE else statistics.experts // 4
    drawn, k = sample(statistics, slots), statistics.top_k
    fitted = []
    for early, index, goal in ((False, 0, known[0]), (False, 1, known[1]),
                               (True, 0, FROM_TOKENS)):  # fmt: skip
        part = slice(0, EARLY_LAYERS) if early else slice(EARLY_LAYERS, None)
        spread = 1.0 if early else ratio[index]
        ahead, found = with_noise(statistics, drawn, spread, goal, index, early)
        routed, missed = drawn.routed[:, :, part], drawn.missed[:, :, part]
        fitted.append(calibrated(ahead, found, routed))
        where = "from tokens" if early else f"distance {index + 1}"
        figures = [
            f"{name} at {listed}: {recall(wanted, found[None], listed)[0]:.3f}"
            for name, wanted in (("routed", routed), (f"missed of {slots}", missed))
            for listed in (k, 2 * k)
        ]
        print(f"  # {where}: {', '.join(figures)}")
    return replace(statistics, ahead=(fitted[0], fitted[1]), from_tokens=fitted[2])


def main() -> None:
    ratio = ratios(STATISTICS[REFERENCE])
    print("# cold noise over noise:", np.round(ratio, 2).tolist())
    for name in sys.argv[1:] or RECALLS:
        fitted = fit(STATISTICS[name], ratio)
        print(name, fitted.ahead, fitted.from_tokens, flush=True)


if __name__ == "__main__":
    main()
