"""Decayed use counts of experts, kept so that the lowest resident one is found quickly.

A use of weight w at token t counts w * 2 ** (-(now - t) / half_life) at `now`. All scores shrink
by one common factor as time goes on, so their order changes only by uses. They are therefore kept
as log2(sum of w * 2 ** (t / half_life)): constant while nothing is used, growing with every use,
and never out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush, heapreplace

from runtime.core import ExpertId
from runtime.eviction import Eviction

HALF_LIFE_TOKENS = 16.0
NEVER = -math.inf


class DecayedScores:
    """The score of every expert that was ever used; `keys` has it in the form that only grows."""

    def __init__(self, half_life_tokens: float = HALF_LIFE_TOKENS) -> None:
        self.half_life_tokens = half_life_tokens
        self.keys: dict[ExpertId, float] = {}

    def use(self, expert: ExpertId, now: float, weight: float) -> None:
        if weight <= 0.0:
            return
        key = now / self.half_life_tokens
        if weight != 1.0:
            key += math.log2(weight)
        old = self.keys.get(expert)
        if old is not None:
            high, low = (key, old) if key > old else (old, key)
            key = high + math.log2(1.0 + 2.0 ** (low - high))
        self.keys[expert] = key

    def score(self, expert: ExpertId, now: float) -> float:
        """Return the decayed count of uses at `now`; 0 for an expert never used."""
        return float(2.0 ** (self.keys.get(expert, NEVER) - now / self.half_life_tokens))


class LowestFirst:
    """Members in the order of keys that only grow, found by a heap that is put right lazily.

    There is at most one heap entry per expert, and it is never above the expert's key. So a use
    costs no heap operation: an entry that was overtaken is put back where it belongs when it
    comes to the top, which happens at most once per use. `heap_operations` counts them.
    """

    def __init__(self, keys: dict[ExpertId, float]) -> None:
        self.heap_operations = 0
        self._keys = keys
        self._heap: list[tuple[float, ExpertId]] = []
        self._queued: set[ExpertId] = set()
        self._members: set[ExpertId] = set()

    def add(self, expert: ExpertId) -> float:
        """Add a member; return its key."""
        assert expert not in self._members, f"{expert} has a slot already"
        self._members.add(expert)
        key = self._keys.get(expert, NEVER)
        if expert not in self._queued:
            self._queued.add(expert)
            self._push((key, expert))
        return key

    def remove(self, expert: ExpertId) -> None:
        self._members.remove(expert)

    def lowest(self) -> tuple[float, ExpertId] | None:
        """Return the member with the lowest key, and that key."""
        heap, keys = self._heap, self._keys
        while heap:
            key, expert = heap[0]
            if expert not in self._members:
                self._queued.remove(expert)
                self._pop()
                continue
            true_key = keys.get(expert, NEVER)
            if key == true_key:
                return heap[0]
            self.heap_operations += 1
            heapreplace(heap, (true_key, expert))
        return None

    def set_aside(self) -> tuple[float, ExpertId]:
        """Take the entry that `lowest` returned out of the order until `put_back`."""
        return self._pop()

    def put_back(self, entry: tuple[float, ExpertId]) -> None:
        self._push(entry)

    def _push(self, entry: tuple[float, ExpertId]) -> None:
        self.heap_operations += 1
        heappush(self._heap, entry)

    def _pop(self) -> tuple[float, ExpertId]:
        self.heap_operations += 1
        return heappop(self._heap)


class DecayedFrequency(Eviction):
    """Lowest decayed use count first; prefetched experts that nobody used go before all others."""

    def __init__(self, half_life_tokens: float = HALF_LIFE_TOKENS) -> None:
        self._scores = DecayedScores(half_life_tokens)
        self._residents = LowestFirst(self._scores.keys)
        self._probation: dict[ExpertId, None] = {}

    @property
    def heap_operations(self) -> int:
        return self._residents.heap_operations

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        self._scores.use(expert, now, weight)
        self._probation.pop(expert, None)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        self._residents.add(expert)
        if prefetched:
            self._probation[expert] = None

    def removed(self, expert: ExpertId) -> None:
        self._residents.remove(expert)
        self._probation.pop(expert, None)

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        for expert in self._probation:
            if may_go(expert):
                return expert
        kept = []
        found = None
        while (entry := self._residents.lowest()) is not None:
            if may_go(entry[1]):
                found = entry[1]
                break
            kept.append(self._residents.set_aside())
        for entry in kept:
            self._residents.put_back(entry)
        return found

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return the decayed count of uses, or minus infinity on probation."""
        return NEVER if expert in self._probation else self._scores.score(expert, now)
