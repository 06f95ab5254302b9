"""Reference replays of one layer's cache: plain, slow, and independent of the runtime's own.

A token's experts are one event: all are looked up first, then the cache changes once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.trace import Trace

Choices = Sequence[frozenset[int]]
Replay = Callable[[Choices, int], int]


def choices(trace: Trace, layer: int) -> list[frozenset[int]]:
    """Return what each pass of a trace routed to at one layer."""
    return [frozenset(forward.layers[layer].demands) for forward in trace.passes]


def lru(tokens: Choices, slots: int) -> int:
    """Return the hits of a cache that forgets the least recently used; every miss is admitted."""
    cached: list[int] = []
    hits = 0
    for wanted in tokens:
        hits += len(wanted & set(cached))
        cached = [expert for expert in cached if expert not in wanted] + sorted(wanted)
        cached = cached[-slots:]
    return hits


def decayed_frequency(tokens: Choices, slots: int, half_life: float = 16.0) -> int:
    """Return the hits where the least used goes, a use losing half its weight per half-life.

    Every miss is admitted, so what the token itself uses stays.
    """
    cached: set[int] = set()
    weight: dict[int, float] = {}
    hits = 0
    for now, wanted in enumerate(tokens):
        hits += len(wanted & cached)
        for expert in wanted:
            weight[expert] = weight.get(expert, 0.0) + 2.0 ** (now / half_life)
        cached |= wanted
        while len(cached) > slots:
            cached.remove(min(cached - wanted, key=lambda expert: (weight[expert], expert)))
    return hits


def optimum(tokens: Choices, slots: int) -> int:
    """Return the most hits any cache can have: keep what is used again soonest, bypass the rest.

    Belady's MIN for events that use several blocks and need not admit them.
    """
    never = len(tokens)
    following: list[dict[int, int]] = []
    ahead: dict[int, int] = {}
    for now in range(len(tokens) - 1, -1, -1):
        following.append({expert: ahead.get(expert, never) for expert in tokens[now]})
        ahead.update(dict.fromkeys(tokens[now], now))
    following.reverse()
    cached: dict[int, int] = {}
    hits = 0
    for now, wanted in enumerate(tokens):
        hits += len(wanted & cached.keys())
        cached.update(following[now])
        soonest = sorted(cached, key=lambda expert: (cached[expert], expert))
        cached = {expert: cached[expert] for expert in soonest[:slots]}
    return hits


def hit_rate(trace: Trace, replay: Replay, slots: int) -> float:
    """Return the share of expert uses that per-layer caches of `slots` experts serve."""
    per_layer = [choices(trace, layer) for layer in range(len(trace.experts))]
    uses = sum(len(wanted) for tokens in per_layer for wanted in tokens)
    return sum(replay(tokens, slots) for tokens in per_layer) / uses
