"""Which experts RAM holds, who reads them there, and what is read from disk next.

Pure, no torch, no threads. The checkpoint is the master copy: a place in RAM is emptied by
forgetting. Whoever drives the tier (the transfer thread under its lock, or the pump under a
virtual clock) owns it. An expert is pinned in its place from the moment somebody was granted it
until he lets go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from runtime.cache import CacheTable, SlotState
from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency
from runtime.telemetry import Counters

READS_IN_FLIGHT = 8
PREFETCH_READS_IN_FLIGHT = 2
"""A demand waits for what the disk is reading: never for more than these."""
SETTLED_TOKENS = 16
"""After so long on the device RAM may forget an expert. Sooner, slots that turn over fast would
send it back to the disk: on a trace of the default model that doubled what was read."""


class Reader(Enum):
    """Who needs an expert's bytes in RAM."""

    LINK = "link"
    CPU = "cpu"


Want = tuple[Reader, ExpertId]


@dataclass(frozen=True)
class Read:
    """Read `expert` from disk into place number `place`, which nobody reads meanwhile."""

    expert: ExpertId
    place: int
    size_bytes: int
    ordered_s: float


@dataclass
class _Urgency:
    demanded: bool
    deadline_s: float


class RamTier:
    """The places of one model's experts in RAM. `layer_bytes[l]` is the size of one of layer l.

    With a place for every expert (`complete`) nothing is ever read again, and nothing counted.
    Otherwise the victim is an expert that settled on the device, if there is one, and else whom
    `eviction` names.
    """

    def __init__(
        self, layer_bytes: Sequence[int], places: int, eviction: Eviction | None = None
    ) -> None:
        assert places > 0, f"{places} places"
        self.table = CacheTable(places, DecayedFrequency() if eviction is None else eviction)
        self.hits = self.misses = self.read_bytes = 0
        self.complete = False
        self._layer_bytes = tuple(layer_bytes)
        self._wants: dict[Want, _Urgency] = {}
        self._held: dict[Want, bool] = {}
        self._reading: dict[ExpertId, Read] = {}
        self._on_device: dict[ExpertId, float] = {}
        self._slots: dict[int, ExpertId] = {}
        self._token = 0.0
        self._layer = 0

    @property
    def reading(self) -> int:
        """How many reads are in flight."""
        return len(self._reading)

    @property
    def waiting(self) -> bool:
        """Whether anybody was not granted what he wants yet."""
        return bool(self._wants)

    def place_of(self, expert: ExpertId) -> int | None:
        """Return where an expert's bytes lie; None while they are not in RAM."""
        number = self.table.find(expert)
        if number is None or self.table.slot(number).state is not SlotState.READY:
            return None
        return number

    def place(self, expert: ExpertId) -> int:
        """Give an expert a free place before anything runs; its bytes are there at once."""
        number, _ = self.table.reserve(expert, None, 0.0, prefetched=False)
        self.table.landed(number)
        return number

    def used(self, layer: int, experts: Iterable[int], token: float) -> None:
        """Note that a layer was routed to `experts`, wherever they are."""
        self._token, self._layer = token, layer
        for expert in experts:
            self.table.eviction.used(ExpertId(layer, expert), token)

    def submitted(self, slot: int) -> None:
        """Note that a slot of the device is being filled anew."""
        gone = self._slots.pop(slot, None)
        if gone is not None:
            self._on_device.pop(gone, None)

    def arrived(self, expert: ExpertId, slot: int) -> None:
        """Note that the device holds `expert` in `slot`."""
        self._slots[slot] = expert
        self._on_device.pop(expert, None)
        self._on_device[expert] = self._token

    def want(self, want: Want, *, demanded: bool, deadline_s: float = 0.0) -> None:
        """Ask for an expert; `next` grants it. Asking again only makes it more urgent."""
        if want in self._held or want in self._wants:
            if demanded:
                self.urge(want)
            return
        if self.place_of(want[1]) is None:
            self.misses += 1
        elif not self.complete:
            self.hits += 1
        self._wants[want] = _Urgency(demanded, deadline_s)

    def urge(self, want: Want) -> None:
        """Somebody waits for this now."""
        if want in self._held:
            self._held[want] = True
        elif want in self._wants:
            self._wants[want].demanded = True

    def holds(self, want: Want) -> bool:
        """Say whether it was granted and not let go of."""
        return want in self._held

    def let_go(self, want: Want) -> None:
        """Give up what was granted or wanted; a read under way goes on and is kept."""
        self._wants.pop(want, None)
        if self._held.pop(want, None) is not None:
            number = self.table.find(want[1])
            assert number is not None, f"{want} was evicted while it was held"
            self.table.unpin(number)
            self.table.trim()

    def let_go_all(self, reader: Reader) -> None:
        """Give up everything of one reader."""
        for want in [each for each in (*self._wants, *self._held) if each[0] is reader]:
            self.let_go(want)

    def next(self, now_s: float) -> tuple[list[Want], list[Read]]:
        """Return what is granted now and which reads begin now, most urgent first."""
        if not self._wants:
            return [], []
        granted = [want for want in self._by_urgency() if self._grant(want)]
        reads = []
        for want in self._by_urgency():
            if len(self._reading) >= READS_IN_FLIGHT:
                break
            if self.table.find(want[1]) is not None:
                continue
            urgency = self._wants[want]
            if not urgency.demanded and not self._may_prefetch(reading=True):
                break
            read = self._begin(want[1], urgency.demanded, now_s)
            if read is None:
                break
            reads.append(read)
        return granted, reads

    def landed(self, read: Read) -> None:
        """Note that a read is done."""
        del self._reading[read.expert]
        self.table.landed(read.place)
        self.read_bytes += read.size_bytes
        self.table.trim()

    def failed(self, read: Read) -> list[Want]:
        """Note that a read failed; return who wanted it and no longer does."""
        del self._reading[read.expert]
        self.table.release(read.place)
        lost = [want for want in self._wants if want[1] == read.expert]
        for want in lost:
            del self._wants[want]
        return lost

    def counted(self, counters: Counters) -> None:
        """Enter what was looked for and read since the start."""
        counters.ram_hits, counters.ram_misses = self.hits, self.misses
        counters.disk_bytes = self.read_bytes

    def count_anew(self) -> None:
        """Forget what was counted."""
        self.hits = self.misses = self.read_bytes = 0

    def begin(self) -> None:
        """Start anew for another device, whoever used the tier before: nobody reads any more."""
        for want in (*self._wants, *self._held):
            self.let_go(want)
        for read in list(self._reading.values()):
            self.failed(read)
        self.count_anew()
        self._on_device.clear()
        self._slots.clear()

    def resize(self, places: int) -> None:
        """Use only the first `places` of the places there ever were; at least one."""
        self.complete = False
        self.table.resize(places)

    @property
    def used_up_to(self) -> int:
        """The number of places that memory is needed for: beyond it nothing lies or will lie."""
        held = (self.table.find(expert) for expert in self.table.experts())
        return max([self.table.capacity, *(n + 1 for n in held if n is not None)])

    def _by_urgency(self) -> list[Want]:
        """Demands by age, then prefetches by deadline."""
        wants = list(self._wants)
        demanded = [want for want in wants if self._wants[want].demanded]
        ahead = [want for want in wants if not self._wants[want].demanded]
        return demanded + sorted(ahead, key=lambda want: self._wants[want].deadline_s)

    def _grant(self, want: Want) -> bool:
        number = self.place_of(want[1])
        demanded = self._wants[want].demanded
        if number is None or not (demanded or self._may_prefetch(reading=False)):
            return False
        self.table.pin(number)
        del self._wants[want]
        self._held[want] = demanded
        return True

    def _may_prefetch(self, *, reading: bool) -> bool:
        """Say whether one more place may go to what nobody waits for: half of them stay for
        demands, so that held prefetches cannot block those."""
        ahead = sum(not demanded for demanded in self._held.values())
        if reading:
            awaited = {want[1] for want, urgency in self._wants.items() if urgency.demanded}
            flying = sum(expert not in awaited for expert in self._reading)
            if flying >= PREFETCH_READS_IN_FLIGHT:
                return False
            ahead += flying
        return ahead < self.table.capacity // 2

    def _begin(self, expert: ExpertId, demanded: bool, now_s: float) -> Read | None:
        victim = None
        if not self.table.free_slots:
            victim = self._victim()
            if victim is None:
                return None
        number, _ = self.table.reserve(expert, victim, self._token, prefetched=not demanded)
        read = Read(expert, number, self._layer_bytes[expert.layer], now_s)
        self._reading[expert] = read
        return read

    def _victim(self) -> ExpertId | None:
        """Return whose place is given away: who settled on the device, else the least used."""
        found: ExpertId | None = None
        forgotten = []
        for expert, since in self._on_device.items():  # the longest there first
            if self._token - since < SETTLED_TOKENS:
                break
            if self.table.find(expert) is None:
                forgotten.append(expert)  # nothing to give up: not looked at again
                continue
            number = self.place_of(expert)
            if number is not None and not self.table.slot(number).pins:
                found = expert
                break
        for expert in forgotten:
            del self._on_device[expert]
        if found is not None:
            return found
        return self.table.victim(self._token, self._layer)
