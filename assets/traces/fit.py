"""Fit the routing statistics of `runtime.synthetic_statistics` to published cache replays.

    python -m assets.traces.fit [MODEL ...]

prints each model's row, and beside each target what the generator gives. Nelder-Mead over shares
and time constants, always with the same random numbers; takes a few minutes per model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.synthetic_routing import RoutingProcess, top_k
from runtime.synthetic_statistics import Lookahead, RoutingStatistics

Array = NDArray[np.float64]
TOKENS, LAYERS, SEED = 2000, 4, 7
HALF_LIFE = 16.0


@dataclass(frozen=True)
class Target:
    """Percentages of one model at three cache sizes (experts per layer), per-layer caches.

    `drift` is the share of the middle size's most used experts that changes per 100 and per 1,000
    tokens, `top_share` the share of requests in the whole trace's most used of that size.
    """

    shape: tuple[int, int, int]
    sizes: tuple[int, int, int]
    lru: tuple[int, int, int]
    frequency: tuple[int, int, int]
    optimum: tuple[int, int, int]
    static: tuple[int, int, int]
    drift: tuple[int, int] | None = None
    top_share: int | None = None


TARGETS = {
    "OLMoE": Target(
        (16, 64, 8), (8, 16, 24), (47, 65, 76), (47, 66, 78), (63, 80, 88), (29, 45, 59),
        (28, 48), 50,
    ),
    "gpt-oss-20b": Target(
        (24, 32, 4), (4, 8, 12), (46, 68, 81), (46, 69, 83), (63, 82, 91), (24, 44, 60)
    ),
    "gpt-oss-120b": Target(
        (36, 128, 4), (16, 32, 48), (63, 80, 89), (65, 82, 90), (79, 90, 95), (28, 47, 62),
        (33, 45), 56,
    ),
    "Qwen3-30B-A3B": Target(
        (48, 128, 8), (16, 32, 48), (61, 81, 91), (63, 82, 91), (77, 91, 96), (17, 32, 46),
        (28, 57), 43,
    ),
    "Mixtral-8x7B": Target(
        (32, 8, 2), (2, 3, 4), (37, 50, 62), (36, 50, 63), (56, 69, 79), (27, 40, 52),
        (40, 50), 42,
    ),
    "DeepSeek-V2-Lite": Target(
        (26, 64, 6), (8, 16, 24), (30, 47, 60), (30, 48, 62), (52, 70, 80), (13, 26, 39),
        (45, 64), 31,
    ),
}  # fmt: skip


def replay(routed: NDArray[np.bool_], sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Return hit percentages of per-layer caches, event-atomic per token and layer.

    Args:
        routed: (tokens, layers, experts), which experts each token used.
    """
    tokens, layers, experts = routed.shape
    capacity = np.repeat(np.asarray(sizes * 3), layers)
    rows = len(capacity)
    third = rows // 3
    following = np.full((tokens, layers, experts), 2.0 * tokens)
    for t in range(tokens - 2, -1, -1):
        following[t] = np.where(routed[t + 1], t + 1.0, following[t + 1])
    order = np.arange(experts) * 1e-6
    cached = np.zeros((rows, experts), bool)
    key = np.zeros((rows, experts))
    used = np.full((layers, experts), -1.0)
    score = np.zeros((layers, experts))
    hits = np.zeros(rows)
    count = len(sizes)
    for t in range(tokens):
        now = np.tile(routed[t], (3 * count, 1))
        hits += (cached & now).sum(axis=1)
        score = score * 0.5 ** (1.0 / HALF_LIFE) + routed[t]
        used[routed[t]] = t
        key[:third] = np.tile(used + order, (count, 1))
        key[third : 2 * third] = np.tile(score + order, (count, 1))
        key[2 * third :] = np.tile(-(following[t] + order), (count, 1))
        key[: 2 * third] += 1e9 * now[: 2 * third]
        candidates = np.where(cached | now, key, -np.inf)
        kth = np.take_along_axis(np.sort(candidates), (experts - capacity)[:, None], axis=1)
        cached = (cached | now) & (candidates >= kth)
    percent = 100.0 * hits.reshape(3, count, layers).mean(axis=2) / routed[:, 0].sum()
    return dict(zip(("lru", "frequency", "optimum"), percent.tolist(), strict=True))


def popularity(routed: NDArray[np.bool_], sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Return what fixed sets of experts would serve, and how fast the most used ones change."""
    tokens, _, _ = routed.shape
    first, total = routed[: tokens // 10].sum(axis=0), routed.sum(axis=0)

    def most_used(counts: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
        ranked = np.argsort(-counts, axis=1, kind="stable")
        best = np.zeros(counts.shape, bool)
        np.put_along_axis(best, ranked[:, :size], True, axis=1)
        return best

    rest = total - first
    static = [100.0 * rest[most_used(first, size)].sum() / rest.sum() for size in sizes]
    middle = sizes[1]
    windows = [
        most_used(routed[t : t + 100].sum(axis=0), middle) for t in range(0, tokens - 99, 100)
    ]

    def changed(lag: int) -> float:
        pairs = zip(windows, windows[lag:], strict=False)
        return 100.0 * (1.0 - float(np.mean([(a & b).sum() / a.sum() for a, b in pairs])))

    return {
        "static": static,
        "drift": [changed(1), changed(10)],
        "top_share": [100.0 * total[most_used(total, middle)].sum() / total.sum()],
    }


def routed_by(statistics: RoutingStatistics, seed: int, tokens: int) -> NDArray[np.bool_]:
    """Return (tokens, layers, experts), the choices of one chat's decode."""
    logits = RoutingProcess(statistics, seed, 1, LAYERS).advance(tokens)[:, 0]
    routed = np.zeros(logits.shape, bool)
    np.put_along_axis(routed, top_k(logits, statistics.top_k), True, axis=-1)
    return routed


def statistics_of(name: str, x: Array) -> RoutingStatistics:
    """Return the statistics that a point of the search stands for.

    Args:
        x: five logits of shares (popularity, topic, passage, phrase, token), then logarithms of
            the three time constants.
    """
    layers, experts, k = TARGETS[name].shape
    share = np.exp(x[:5] - x[:5].max())
    share /= share.sum()
    topic, passage, phrase = (round(float(tau), 2) for tau in np.exp(x[5:]))
    none = Lookahead(0.0, 0.0, 1.0, 0.0)
    shares = [round(float(s), 4) for s in share]
    return RoutingStatistics(
        name, layers, experts, k, shares[0], shares[1], topic, shares[2], passage, shares[3],
        phrase, (none, none), none,
    )  # fmt: skip


def measured(statistics: RoutingStatistics, seeds: tuple[int, ...]) -> dict[str, Array]:
    """Return every figure of `Target`, in percent, averaged over `seeds`."""
    sizes = TARGETS[statistics.name].sizes
    runs = []
    for seed in seeds:
        routed = routed_by(statistics, seed, TOKENS)
        runs.append(replay(routed, sizes) | popularity(routed, sizes))
    return {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}


def misfit(target: Target, found: dict[str, Array]) -> float:
    """Return weighted squared points off the targets; hit rates count most."""
    total = 0.0
    for key, weight in (("lru", 1.0), ("frequency", 1.0), ("optimum", 1.0), ("static", 0.05)):
        off = found[key] - np.asarray(getattr(target, key))
        total += weight * float((off**2).sum())
        if weight == 1.0:
            total += 10.0 * float((np.maximum(np.abs(off) - 1.5, 0.0) ** 2).sum())
    if target.drift is not None:
        total += 0.05 * float(((found["drift"] - np.asarray(target.drift)) ** 2).sum())
    if target.top_share is not None:
        total += 0.05 * float((found["top_share"][0] - target.top_share) ** 2)
    return total


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
    """Search from a common start, then again from where that ended."""
    target = TARGETS[name]

    def f(x: Array) -> float:
        bounded = x.copy()
        bounded[5:] = np.clip(x[5:], np.log([200.0, 12.0, 0.7]), np.log([4000.0, 150.0, 8.0]))
        outside = float(((x - bounded) ** 2).sum())
        return misfit(target, measured(statistics_of(name, bounded), (SEED,))) + 50.0 * outside

    x = np.array([-1.5, -0.5, -0.5, -1.0, -0.5, np.log(1000.0), np.log(50.0), np.log(2.0)])
    for step in (0.5, 0.2):
        x = nelder_mead(f, x, step, calls // 2)
    return statistics_of(name, x)


def report(statistics: RoutingStatistics, seeds: tuple[int, ...] = (7, 8, 9)) -> None:
    """Print each target with what the generator gives."""
    target, found = TARGETS[statistics.name], measured(statistics, seeds)
    for key, values in found.items():
        wanted = getattr(target, key)
        print(f"  {key:10} {np.round(values, 1).tolist()} for {wanted}")


def main() -> None:
    for name in sys.argv[1:] or TARGETS:
        start = time.perf_counter()
        statistics = fit(name, 300)
        print(statistics, f"# {time.perf_counter() - start:.0f} s", flush=True)
        report(replace(statistics))


if __name__ == "__main__":
    main()
