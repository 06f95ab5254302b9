"""Fit the routing statistics of `runtime.synthetic_statistics` to published cache replays.

    python -m assets.traces.fit [MODEL ...]

prints each model's row, and beside each target what the generator gives. Nelder-Mead over shares
and time constants, always with the same random numbers; a few minutes per model.

The published replays run chats of 450 to 950 tokens back to back and carry the cache across; so
does this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assets.traces.replay import drift, hit_percent, most_used
from runtime.synthetic_routing import RoutingProcess, top_k
from runtime.synthetic_statistics import STATISTICS, Lookahead, RoutingStatistics

Array = NDArray[np.float64]
Choices = NDArray[np.bool_]
CHATS, CHAT_TOKENS, LINES, LAYERS, SEED = 3, 700, 2, 8, 7
PROFILE_CHATS, PROFILE_TOKENS = 12, 128


@dataclass(frozen=True)
class Target:
    """What was measured of one model at three cache sizes (experts per layer), batch 1.

    `reads` are experts copied per token by LRU, decayed frequency and the optimum; the rest are
    percentages: `static` hits of the most used experts of the first tenth of the trace, `drift`
    the share of the middle size's most used that changes from 100 tokens to the next 100 and from
    1,000 to the next, `union` the experts used in 16 tokens over the smallest size.
    """

    shape: tuple[int, int, int]
    sizes: tuple[int, int, int]
    reads: tuple[tuple[float, float, float], ...]
    static: tuple[int, int, int]
    drift: tuple[int, int]
    union: float

    @property
    def hits(self) -> Array:
        """Return hit percentages, (3 rules, 3 sizes)."""
        layers, _, k = self.shape
        return 100.0 * (1.0 - np.asarray(self.reads) / (layers * k))


TARGETS = {
    "OLMoE": Target(
        (16, 64, 8), (8, 16, 24),
        ((68.3, 44.6, 30.2), (67.4, 42.9, 28.0), (47.5, 25.5, 14.9)),
        (29, 45, 59), (28, 48), 4.47,
    ),
    "gpt-oss-20b": Target(
        (24, 32, 4), (4, 8, 12),
        ((51.4, 31.1, 18.0), (51.8, 29.5, 16.2), (35.8, 17.4, 8.8)),
        (24, 44, 60), (29, 48), 4.06,
    ),
    "gpt-oss-120b": Target(
        (36, 128, 4), (16, 32, 48),
        ((53.7, 28.3, 15.3), (50.2, 25.8, 14.4), (30.3, 13.7, 6.9)),
        (28, 47, 62), (33, 45), 1.68,
    ),
    "Qwen3-30B-A3B": Target(
        (48, 128, 8), (16, 32, 48),
        ((148.2, 73.2, 35.5), (143.0, 68.0, 32.8), (86.5, 35.4, 15.7)),
        (17, 32, 46), (28, 57), 2.43,
    ),
    "Mixtral-8x7B": Target(
        (32, 8, 2), (2, 3, 4),
        ((40.2, 32.1, 24.5), (41.2, 32.1, 24.0), (28.2, 19.6, 13.3)),
        (27, 40, 52), (40, 50), 3.75,
    ),
    "DeepSeek-V2-Lite": Target(
        (26, 64, 6), (8, 16, 24),
        ((108.7, 82.7, 61.9), (109.0, 81.0, 59.1), (74.2, 46.8, 30.4)),
        (13, 26, 39), (45, 64), 5.02,
    ),
}  # fmt: skip


def routed_by(statistics: RoutingStatistics, seed: int, sequences: int, tokens: int) -> Choices:
    """Return (tokens, sequences, layers, experts), what independent chats chose."""
    logits = RoutingProcess(statistics, seed, sequences, LAYERS).advance(tokens)
    routed = np.zeros(logits.shape, bool)
    np.put_along_axis(routed, top_k(logits, statistics.top_k), True, axis=-1)
    return routed


@dataclass(frozen=True)
class Found:
    """What the generator gives, in the units of `Target`."""

    hits: Array
    static: Array
    drift: Array
    union: float


def measured(statistics: RoutingStatistics, seed: int) -> Found:
    """Replay a few lines of chats back to back; the first chat warms the caches."""
    target = TARGETS[statistics.name]
    first = 10 * seed
    chats = [routed_by(statistics, first + i, LINES, CHAT_TOKENS) for i in range(CHATS)]
    lines = np.concatenate(chats)
    rows = lines.reshape(len(lines), -1, statistics.experts)
    window = np.stack([rows[t : t + 16].any(axis=0) for t in range(0, len(rows) - 16, 16)])
    profile = routed_by(statistics, first + CHATS, PROFILE_CHATS, PROFILE_TOKENS)
    used = profile.sum(axis=(0, 1))
    served = [lines[:, :, most_used(used, size)].sum() / lines.sum() for size in target.sizes]
    return Found(
        hit_percent(rows, target.sizes, CHAT_TOKENS),
        100.0 * np.asarray(served),
        np.asarray([drift(rows, target.sizes[1], length) for length in (100, 1000)]),
        float(window.sum(axis=-1).mean()) / target.sizes[0],
    )


def statistics_of(name: str, x: Array) -> RoutingStatistics:
    """Return the statistics that a point of the search stands for.

    Args:
        x: logarithms of the five shares (popularity, topic, passage, phrase, token; scaled to add
            up to 1), of the three time constants, and of the layers' spread.
    """
    layers, experts, k = TARGETS[name].shape
    share = np.exp(x[:5] - x[:5].max())
    share /= share.sum()
    none = Lookahead(0.0, 0.0, 1.0, 0.0)
    popularity, topic, passage, phrase = (round(float(s), 3) for s in share[:4])
    topic_tokens, passage_tokens, phrase_tokens, spread = (
        round(float(t), 2) for t in np.exp(x[5:])
    )
    return RoutingStatistics(
        name, layers, experts, k,
        popularity, topic, topic_tokens, passage, passage_tokens, phrase, phrase_tokens,
        spread, (none, none), none,
    )  # fmt: skip


def point_of(statistics: RoutingStatistics) -> Array:
    """Return the point of the search that stands for `statistics`."""
    s = statistics
    shares = (s.popularity_share, s.topic_share, s.passage_share, s.phrase_share, s.token_share)
    tokens = (s.topic_tokens, s.passage_tokens, s.phrase_tokens)
    return np.log(np.maximum((*shares, *tokens, s.layer_spread), 0.002))


def misfit(target: Target, found: Found) -> float:
    """Return weighted squared points off the targets; hit rates count most."""
    off = found.hits - target.hits
    total = float((off**2).sum() + 10.0 * (np.maximum(np.abs(off) - 1.5, 0.0) ** 2).sum())
    total += 0.1 * float(((found.static - np.asarray(target.static)) ** 2).sum())
    return total + 0.1 * float(((found.drift - np.asarray(target.drift)) ** 2).sum())


def nelder_mead(f: Callable[[Array], float], x: Array, step: float, calls: int) -> Array:
    """Minimise `f` from `x` (Nelder and Mead 1965, the usual coefficients)."""
    simplex = [(f(x), x)]
    for i in range(len(x)):
        vertex = x.copy()
        vertex[i] += step
        simplex.append((f(vertex), vertex))
    used = len(simplex)
    while used < calls:
        simplex.sort(key=lambda pair: pair[0])
        worst, point = simplex[-1]
        centre = np.mean([vertex for _, vertex in simplex[:-1]], axis=0)

        def at(scale: float, centre: Array = centre, point: Array = point) -> tuple[float, Array]:
            tried = centre + scale * (centre - point)
            return f(tried), tried

        best = at(1.0)
        used += 1
        if best[0] < simplex[0][0]:
            best = min(best, at(2.0), key=lambda pair: pair[0])
            used += 1
        elif best[0] >= simplex[-2][0]:
            best = min(best, at(0.5), at(-0.5), key=lambda pair: pair[0])
            used += 2
        if best[0] < worst:
            simplex[-1] = best
        else:
            lowest = simplex[0][1]
            shrunk = [(lowest + vertex) / 2.0 for _, vertex in simplex[1:]]
            simplex[1:] = [(f(vertex), vertex) for vertex in shrunk]
            used += len(shrunk)
    return min(simplex, key=lambda pair: pair[0])[1]


def fit(name: str, calls: int) -> RoutingStatistics:
    """Search from the row as it is, then again from where that ended."""
    target = TARGETS[name]
    low = np.asarray([-6.0] * 5 + np.log([200.0, 12.0, 0.7, 0.2]).tolist())
    high = np.asarray([4.0] * 5 + np.log([4000.0, 150.0, 8.0, 2.5]).tolist())

    def f(x: Array) -> float:
        bounded = np.clip(x, low, high)
        outside = float(((x - bounded) ** 2).sum())
        return misfit(target, measured(statistics_of(name, bounded), SEED)) + 50.0 * outside

    x = point_of(STATISTICS[name])
    for step in (0.4, 0.15):
        x = nelder_mead(f, x, step, calls // 2)
    return statistics_of(name, np.clip(x, low, high))


def report(statistics: RoutingStatistics, seeds: tuple[int, ...]) -> None:
    """Print each target with what other random numbers than the fit's give."""
    target = TARGETS[statistics.name]
    runs = [measured(statistics, seed) for seed in seeds]
    for name in ("hits", "static", "drift", "union"):
        values = np.mean([getattr(run, name) for run in runs], axis=0)
        wanted = np.round(getattr(target, name), 1).tolist()
        print(f"  # {name:6} {np.round(values, 1).tolist()} for {wanted}", flush=True)


def main() -> None:
    for name in sys.argv[1:] or TARGETS:
        start = time.perf_counter()
        statistics = fit(name, 160)
        print(statistics, f"# {time.perf_counter() - start:.0f} s")
        report(statistics, (20, 21, 22, 23))


if __name__ == "__main__":
    main()
