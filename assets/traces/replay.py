"""Many caches at once, in NumPy: what the fit compares with the published tables.

Event-atomic: a token's experts of a layer are looked up first, then the cache changes once.
`tests/replays.py` has the same rules in plain Python.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Choices = NDArray[np.bool_]
HALF_LIFE_TOKENS = 16.0


def hit_percent(routed: Choices, sizes: tuple[int, ...], warm: int) -> Array:
    """Return hit percentages of LRU, decayed frequency and the optimum, (3, sizes).

    LRU admits every miss; decayed frequency only what it scores above the worst it holds, never
    dropping what the token itself uses; the optimum (Belady's MIN) may bypass too.

    Args:
        routed: (tokens, caches, experts), which experts each token used.
        sizes: experts that a cache holds.
        warm: tokens before the hits count.
    """
    tokens, caches, experts = routed.shape
    never = 2.0 * tokens
    following = np.full(routed.shape, never, np.float32)
    for t in range(tokens - 2, -1, -1):
        following[t] = np.where(routed[t + 1], np.float32(t + 1), following[t + 1])
    first_of_equals = np.arange(experts, dtype=np.float32) / (2 * experts)
    half = np.float32(0.5 ** (1.0 / HALF_LIFE_TOKENS))
    cached = np.zeros((3, len(sizes), caches, experts), bool)
    key = np.zeros((3, 1, caches, experts), np.float32)
    lru, frequency, optimum = key[:, 0]
    lru -= 1.0
    score = np.zeros((caches, experts), np.float32)
    pinned = np.zeros(cached.shape, np.float32)
    hits = np.zeros((3, len(sizes)))
    for t, now in enumerate(routed):
        hit = cached & now
        if t >= warm:
            hits += hit.sum(axis=(2, 3))
        score *= half
        score += now
        np.copyto(lru, t + first_of_equals, where=now)
        np.add(score, first_of_equals * np.float32(1e-3), out=frequency)
        np.subtract(-following[t], first_of_equals, out=optimum)
        np.multiply(hit[1], np.float32(1e9), out=pinned[1])
        cached |= now
        candidates = np.where(cached, key + pinned, np.float32(-np.inf))
        ranked = np.sort(candidates, axis=-1)
        for index, size in enumerate(sizes):
            lowest_kept = ranked[:, index, :, experts - size, None]
            cached[:, index] &= candidates[:, index] >= lowest_kept
    return np.asarray(100.0 * hits / routed[warm:].sum())


def most_used(counts: NDArray[np.int64], size: int) -> Choices:
    """Return which `size` experts of the last axis were used most."""
    ranked = np.argsort(-counts, axis=-1, kind="stable")
    best = np.zeros(counts.shape, bool)
    np.put_along_axis(best, ranked[..., :size], True, axis=-1)
    return best


def drift(routed: Choices, size: int, length: int) -> float:
    """Return the percentage of the most used that changes from one window to the next."""
    starts = range(0, len(routed) - length + 1, length)
    windows = [most_used(routed[t : t + length].sum(axis=0), size) for t in starts]
    same = [(a & b).sum() / a.sum() for a, b in zip(windows, windows[1:], strict=False)]
    return 100.0 * (1.0 - float(np.mean(same)))
