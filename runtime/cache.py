"""The cache table: which expert is in which slot, and who has to go.

Pure bookkeeping, no torch. One thread owns the table. A slot goes FREE -> LOADING -> READY ->
FREE; a pinned or loading slot is never a victim; evicting is forgetting, because the master copy
of every expert stays in the store. Who goes is decided by an `Eviction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from runtime.core import ExpertId
from runtime.eviction import Eviction

Flags = NDArray[np.bool_]
NOBODY: Flags = np.empty(0, np.bool_)


class SlotState(Enum):
    FREE = "free"
    LOADING = "loading"
    READY = "ready"


@dataclass
class Slot:
    """One slot. `unused_prefetch_bytes` is what a prefetch brought that nobody used yet."""

    state: SlotState = SlotState.FREE
    expert: ExpertId | None = None
    pins: int = 0
    unused_prefetch_bytes: int = 0


def _nobody(expert: ExpertId) -> bool:
    return False


class CacheTable:
    """Slots of one global pool over all layers.

    `capacity` may shrink and grow below the number of slots that were allocated: slots from
    `capacity` up are emptied as soon as nobody pins or fills them.
    """

    def __init__(self, slots: int, eviction: Eviction) -> None:
        self._slots = [Slot() for _ in range(slots)]
        self._where: dict[int, dict[int, int]] = {}  # slots by layer and expert
        self._held: dict[int, Flags] = {}
        self._loading: dict[ExpertId, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._beyond: set[int] = set()  # slots from `capacity` up that are not empty yet
        self.eviction = eviction
        self.capacity = slots

    @property
    def used(self) -> int:
        return sum(map(len, self._where.values()))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def unused_prefetch_bytes(self) -> int:
        """Bytes of prefetched experts that landed and wait for their first use."""
        ready = SlotState.READY
        return sum(slot.unused_prefetch_bytes for slot in self._slots if slot.state is ready)

    @property
    def slots(self) -> Sequence[Slot]:
        return self._slots

    def slot(self, number: int) -> Slot:
        return self._slots[number]

    def find(self, expert: ExpertId) -> int | None:
        """Return the slot that holds or awaits `expert`, or None."""
        return self.here(expert.layer).get(expert.expert)

    def here(self, layer: int) -> dict[int, int]:
        """Return the slots of a layer's experts that have one, be it on their way there."""
        here = self._where.get(layer)
        if here is None:
            here = self._where[layer] = {}
        return here

    def held(self, layer: int) -> Flags:
        """Return the same as flags by expert; beyond their end nobody has a slot."""
        return self._held.get(layer, NOBODY)

    def holds(self, expert: ExpertId) -> bool:
        """Say whether `expert` has a slot, be it on its way there."""
        return expert.expert in self.here(expert.layer)

    def experts(self) -> list[ExpertId]:
        """Return what the slots hold or await, in no particular order."""
        layers = [(layer, list(here)) for layer, here in list(self._where.items())]
        return [ExpertId(layer, number) for layer, numbers in layers for number in numbers]

    def unawaited(self) -> list[ExpertId]:
        """Return what is being copied without anybody waiting for it."""
        return [expert for expert, number in self._loading.items() if not self._slots[number].pins]

    def evict_by(self, eviction: Eviction, now: float) -> None:
        """Let another rule decide from now on; what is resident stays."""
        self.eviction = eviction
        for expert in self.experts():
            eviction.admitted(expert, now, prefetched=False)
            if not self._evictable(self._place(expert)):
                eviction.fixed(expert)

    def victim(
        self, now: float, layer: int, protected: Callable[[ExpertId], bool] = _nobody
    ) -> ExpertId | None:
        """Return who would go while `layer` is served; None if nobody may."""

        def may_go(expert: ExpertId) -> bool:
            slot = self._slots[self._place(expert)]
            return slot.state is SlotState.READY and slot.pins == 0 and not protected(expert)

        return self.eviction.victim(may_go, now, layer)

    def reserve(
        self, expert: ExpertId, victim: ExpertId | None, now: float, *, prefetched: bool
    ) -> tuple[int, Slot | None]:
        """Give `expert` a LOADING slot: that of `victim`, or a free one where it is None.

        Returns:
            The slot and what was evicted from it (None if it was free).
        """
        here = self.here(expert.layer)
        assert expert.expert not in here, f"{expert} already has a slot"
        evicted = None
        if victim is None:
            number = self._free.pop()
        else:
            number = self._place(victim)
            evicted = self._forget(number)
        slot = self._slots[number]
        slot.state, slot.expert = SlotState.LOADING, expert
        here[expert.expert] = self._loading[expert] = number
        self._flag(expert)
        self.eviction.fixed(expert)
        self.eviction.admitted(expert, now, prefetched=prefetched)
        return number, evicted

    def landed(self, number: int) -> None:
        """LOADING -> READY."""
        slot = self._slots[number]
        assert slot.state is SlotState.LOADING, f"slot {number} is {slot.state.value}"
        slot.state = SlotState.READY
        assert slot.expert is not None
        del self._loading[slot.expert]
        if not slot.pins:
            self.eviction.loosed(slot.expert)

    def release(self, number: int) -> Slot:
        """Empty a slot that nobody pins, whatever its state; return what it held."""
        slot = self._forget(number)
        if number < self.capacity:
            self._free.append(number)
        else:
            self._beyond.discard(number)
        return slot

    def pin(self, number: int) -> None:
        slot = self._slots[number]
        slot.pins += 1
        if slot.pins == 1 and slot.state is SlotState.READY and slot.expert is not None:
            self.eviction.fixed(slot.expert)

    def unpin(self, number: int) -> None:
        slot = self._slots[number]
        assert slot.pins > 0, f"slot {number} is not pinned"
        slot.pins -= 1
        if not slot.pins and slot.state is SlotState.READY and slot.expert is not None:
            self.eviction.loosed(slot.expert)

    def pin_all(self, layer: int, experts: Sequence[int]) -> None:
        """Pin residents of a layer that nobody pins."""
        here, slots = self._where[layer], self._slots
        for number in experts:
            slot = slots[here[number]]
            assert not slot.pins, f"{slot.expert} is pinned already"
            slot.pins = 1
        self.eviction.fixed_all(layer, experts)

    def unpin_all(self, layer: int, experts: Sequence[int]) -> None:
        """Take back the only pin of each of these residents."""
        here, slots = self._where[layer], self._slots
        for number in experts:
            slot = slots[here[number]]
            assert slot.pins == 1, f"{slot.expert} is pinned {slot.pins} times"
            slot.pins = 0
        self.eviction.loosed_all(layer, experts)

    def resize(self, capacity: int) -> list[Slot]:
        """Allow `capacity` of the allocated slots; return what was evicted now.

        Slots beyond it that are pinned or loading are emptied by `trim`, once they can be.
        """
        assert 0 < capacity <= len(self._slots), f"{capacity} of {len(self._slots)} slots"
        grown = range(self.capacity, capacity)
        self.capacity = capacity
        self._free = [number for number in self._free if number < capacity]
        self._free += [n for n in grown if self._slots[n].state is SlotState.FREE]
        held = {number for here in self._where.values() for number in here.values()}
        self._beyond = {number for number in held if number >= capacity}
        return self.trim()

    def trim(self) -> list[Slot]:
        """Empty the slots beyond `capacity` that can be emptied; return what they held."""
        if not self._beyond:
            return []
        return [self.release(number) for number in sorted(self._beyond) if self._evictable(number)]

    def check(self) -> None:
        """Raise AssertionError with the numbers if the table contradicts itself."""
        held = {n for n, slot in enumerate(self._slots) if slot.state is not SlotState.FREE}
        places = sorted(number for here in self._where.values() for number in here.values())
        assert sorted(held) == places, (sorted(held), places)
        assert len(self._free) == len(set(self._free)), f"a slot is free twice: {self._free}"
        assert not held & set(self._free), sorted(held & set(self._free))
        free_within = {n for n in range(self.capacity) if n not in held}
        assert free_within == set(self._free), (sorted(free_within), sorted(self._free))
        beyond = {number for number in held if number >= self.capacity}
        assert beyond == self._beyond, (sorted(beyond), sorted(self._beyond))
        loading = {n for n, slot in enumerate(self._slots) if slot.state is SlotState.LOADING}
        assert loading == set(self._loading.values()), (sorted(loading), self._loading)
        for expert in self.experts():
            assert self._slots[self._place(expert)].expert == expert, expert
        flagged = {
            ExpertId(n, e) for n, row in self._held.items() for e in row.nonzero()[0].tolist()
        }
        assert flagged == set(self.experts()), (sorted(flagged), sorted(self.experts()))

    def _flag(self, expert: ExpertId) -> None:
        flags = self._held.get(expert.layer, NOBODY)
        if expert.expert >= len(flags):
            flags = np.pad(flags, (0, expert.expert + 1 - len(flags)))
            self._held[expert.layer] = flags
        flags[expert.expert] = True

    def _place(self, expert: ExpertId) -> int:
        return self._where[expert.layer][expert.expert]

    def _evictable(self, number: int) -> bool:
        slot = self._slots[number]
        return slot.state is SlotState.READY and slot.pins == 0

    def _forget(self, number: int) -> Slot:
        slot = self._slots[number]
        assert slot.pins == 0, f"slot {number} is pinned {slot.pins} times"
        assert slot.expert is not None, f"slot {number} is free already"
        del self._where[slot.expert.layer][slot.expert.expert]
        self._held[slot.expert.layer][slot.expert.expert] = False
        self._loading.pop(slot.expert, None)
        self.eviction.removed(slot.expert)
        self._slots[number] = Slot()
        return slot
