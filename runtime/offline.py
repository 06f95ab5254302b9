"""What is best when the whole routing trace is known beforehand.

Belady's MIN (1966) with bypass for one global pool of slots. All experts of one (pass, layer) are
needed at once, so a step of the trace is one (pass, layer), numbered `pass * layers + layer`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.trace import ForwardPass

NEVER = 1 << 40  # the step of a next use that does not come


def next_uses(passes: Sequence[ForwardPass]) -> list[list[dict[int, int]]]:
    """Return, for each pass, layer and expert routed there, the step of the expert's next use.

    A step is `pass * layers + layer`; `NEVER` where the expert is not used again.
    """
    layers = len(passes[0].layers) if passes else 0
    upcoming: list[dict[int, int]] = [{} for _ in range(layers)]
    result: list[list[dict[int, int]]] = [[] for _ in passes]
    for pass_index in range(len(passes) - 1, -1, -1):
        for layer, step in enumerate(passes[pass_index].layers):
            known, now = upcoming[layer], pass_index * layers + layer
            result[pass_index].append({e: known.get(e, NEVER) for e in step.demands})
            known.update(dict.fromkeys(step.demands, now))
    return result


def offline_misses(passes: Sequence[ForwardPass], slots: int, *, free_start: bool = False) -> int:
    """Return the fewest uses that any placement serves by a load or on the CPU.

    No order of loads, evictions, prefetches and CPU work can have fewer loads plus CPU-served
    uses: a load ahead of its use can be put off until that use without costing more, and of what
    is at hand after a step, those used soonest are kept. The pool starts empty; with `free_start`
    it starts with the best experts for nothing, which bounds also a policy that fills its slots
    before the trace begins.
    """
    width = 1 + max((e for p in passes for step in p.layers for e in step.demands), default=0)
    layers = len(passes[0].layers) if passes else 0
    span = layers * width
    latest: list[int] = []  # -(next use * span + expert), so the latest next use is on top
    here: set[int] = set()
    if free_start:
        first: dict[int, int] = {}
        for pass_index, forward in enumerate(passes):
            for layer, step in enumerate(forward.layers):
                for expert in step.demands:
                    first.setdefault(layer * width + expert, pass_index * layers + layer)
        here = set(sorted(first, key=first.__getitem__)[:slots])
        latest = [-(first[number] * span + number) for number in here]
        heapify(latest)
    misses = 0
    for following in next_uses(passes):
        for layer, experts in enumerate(following):
            for expert, next_use in experts.items():
                number = layer * width + expert
                if number not in here:
                    misses += 1
                here.add(number)
                heappush(latest, -(next_use * span + number))
            # Entries of uses that have passed lie below those of every expert that is here.
            while len(here) > slots:
                here.remove(-heappop(latest) % span)
    return misses


class OfflineOptimal(Eviction):
    """Latest next use first, the whole trace being known: the eviction of the policy `oracle`.

    `at` has to be told of every step before its layer is served; experts routed at that step
    count from their use after it.
    """

    def __init__(self, passes: Sequence[ForwardPass]) -> None:
        self._layers = len(passes[0].layers) if passes else 1
        self._passes = passes
        self._uses: dict[ExpertId, list[int]] = {}
        for pass_index, forward in enumerate(passes):
            for layer, step in enumerate(forward.layers):
                for number in step.demands:
                    uses = self._uses.setdefault(ExpertId(layer, number), [])
                    uses.append(pass_index * self._layers + layer)
        self._step = -1
        self._residents: set[ExpertId] = set()
        self._latest: list[tuple[int, ExpertId]] = []

    def at(self, pass_index: int, layer: int) -> None:
        """Say that MoE layer `layer` of a pass is served from now on; positions never go back."""
        step = pass_index * self._layers + layer
        assert step >= self._step, f"step {step} comes after step {self._step}"
        passed = range(self._step + 1, step + 1)
        self._step = step
        for number in passed:
            of_pass, of_layer = divmod(number, self._layers)
            for routed in self._passes[of_pass].layers[of_layer].demands:
                expert = ExpertId(of_layer, routed)
                if expert in self._residents:
                    heappush(self._latest, (-self.next_use(expert), expert))

    def next_use(self, expert: ExpertId) -> int:
        """Return the step of the first use after the present step, or `NEVER`."""
        uses = self._uses.get(expert, [])
        index = bisect_left(uses, self._step + 1)
        return uses[index] if index < len(uses) else NEVER

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        """Nothing to learn: the uses are known."""

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        assert expert not in self._residents, f"{expert} has a slot already"
        self._residents.add(expert)
        heappush(self._latest, (-self.next_use(expert), expert))

    def removed(self, expert: ExpertId) -> None:
        self._residents.remove(expert)

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        kept = []
        found = None
        while self._latest:
            negated, expert = self._latest[0]
            if expert not in self._residents or -negated != self.next_use(expert):
                heappop(self._latest)
            elif may_go(expert):
                found = expert
                break
            else:
                kept.append(heappop(self._latest))
        for entry in kept:
            heappush(self._latest, entry)
        return found

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return minus the step of the next use."""
        return -float(self.next_use(expert))
