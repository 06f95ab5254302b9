"""Reference replays of one layer's cache: plain, slow, and independent of the runtime's own.

A token's experts are one event: all are looked up first, then the cache changes once. Each replay
returns the hits of every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.trace import ForwardPass

Choices = Sequence[frozenset[int]]
Replay = Callable[[Choices, int], list[int]]


def choices(passes: Sequence[ForwardPass], layer: int) -> list[frozenset[int]]:
    """Return what each pass routed to at one layer."""
    return [frozenset(forward.layers[layer].demands) for forward in passes]


def lru(tokens: Choices, slots: int) -> list[int]:
    """Forget the least recently used; admit every miss."""
    cached: list[int] = []
    hits = []
    for wanted in tokens:
        hits.append(len(wanted & set(cached)))
        cached = [expert for expert in cached if expert not in wanted] + sorted(wanted)
        cached = cached[-slots:]
    return hits


def decayed_frequency(tokens: Choices, slots: int, half_life: float = 16.0) -> list[int]:
    """Forget the least used, a use losing half its weight per half-life.

    A miss is admitted if it weighs more than the victim, which is never what this token uses.
    """
    cached: set[int] = set()
    weight: dict[int, float] = {}
    hits = []
    for now, wanted in enumerate(tokens):
        hits.append(len(wanted & cached))
        for expert in wanted:
            weight[expert] = weight.get(expert, 0.0) + 2.0 ** (now / half_life)
        for expert in sorted(wanted - cached, key=weight.__getitem__, reverse=True):
            victims = cached - wanted
            if len(cached) < slots:
                cached.add(expert)
            elif victims:
                lightest = min(victims, key=weight.__getitem__)
                if weight[lightest] < weight[expert]:
                    cached.remove(lightest)
                    cached.add(expert)
    return hits


def optimum(tokens: Choices, slots: int) -> list[int]:
    """Keep what is used again soonest and bypass the rest: no cache has more hits in all.

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
    hits = []
    for now, wanted in enumerate(tokens):
        hits.append(len(wanted & cached.keys()))
        cached.update(following[now])
        soonest = sorted(cached, key=cached.__getitem__)
        cached = {expert: cached[expert] for expert in soonest[:slots]}
    return hits


def hit_rate(passes: Sequence[ForwardPass], replay: Replay, slots: int, warm: int = 0) -> float:
    """Return the share of expert uses after `warm` passes that per-layer caches serve."""
    hits = uses = 0
    for layer in range(len(passes[0].layers)):
        tokens = choices(passes, layer)
        hits += sum(replay(tokens, slots)[warm:])
        uses += sum(map(len, tokens[warm:]))
    return hits / uses
