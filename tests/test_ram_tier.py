"""The tier of experts in RAM: whatever order things happen in, it keeps its promises."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from runtime.cache import SlotState
from runtime.core import ExpertId
from runtime.errors import ModelFilesError
from runtime.ram_tier import (
    PREFETCH_READS_IN_FLIGHT,
    READS_IN_FLIGHT,
    SETTLED_TOKENS,
    RamTier,
    Read,
    Reader,
    Want,
)
from runtime.supply import Supply
from runtime.transfer_queue import (
    Cancel,
    Cause,
    Chunk,
    Hold,
    Order,
    Outcome,
    Promote,
    Submit,
    TransferEnded,
    TransferQueue,
)

LAYERS, EXPERTS = 3, 6
ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


class Machine:
    """A tier under random use, with a memory of its own that says what lies where."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.places = self.random.choice([1, 2, 3, 5, 9, len(ALL)])
        self.tier = RamTier([64] * LAYERS, self.places)
        self.memory: dict[int, ExpertId | None] = {}
        self.reads: list[Read] = []
        self.granted: set[Want] = set()
        for expert in ALL[: self.random.randint(0, self.places)]:
            self.memory[self.tier.place(expert)] = expert

    def step(self) -> None:
        kind = self.random.random()
        want = (self.random.choice(list(Reader)), self.random.choice(ALL))
        if kind < 0.4:
            demanded = want[0] is Reader.CPU or self.random.random() < 0.5
            self.tier.want(want, demanded=demanded, deadline_s=self.random.random())
        elif kind < 0.5:
            self.tier.urge(want)
        elif kind < 0.7 and self.granted:
            want = self.random.choice(sorted(self.granted, key=str))
            self.granted.discard(want)
            self.tier.let_go(want)
        elif kind < 0.75:
            self.granted.discard(want)
            self.tier.let_go(want)
        elif kind < 0.9 and self.reads:
            self.land(self.reads.pop(self.random.randrange(len(self.reads))))
        elif kind < 0.95 and self.reads:
            read = self.reads.pop()
            assert all(want[1] == read.expert for want in self.tier.failed(read))
        elif kind < 0.97:
            self.tier.resize(self.random.randint(1, self.places))
        else:
            self.tier.used(0, [self.random.randrange(EXPERTS)], self.random.random())
            self.tier.submitted(0)
            self.tier.arrived(self.random.choice(ALL), 0)
        self.advance()
        self.check()

    def land(self, read: Read) -> None:
        self.memory[read.place] = read.expert
        self.tier.landed(read)

    def advance(self) -> None:
        granted, reads = self.tier.next(0.0)
        self.granted |= set(granted)
        for read in reads:
            self.memory[read.place] = None
        self.reads += reads

    def check(self) -> None:
        self.tier.table.check()
        assert len(self.reads) == self.tier.reading <= READS_IN_FLIGHT
        for want in self.granted:
            place = self.tier.place_of(want[1])
            assert place is not None, f"{want} was evicted"
            assert self.memory[place] == want[1], "somebody reads what is not there"
            assert self.tier.table.slot(place).pins >= 1
        for expert in ALL:
            place = self.tier.place_of(expert)
            assert place is None or self.memory[place] == expert

    def drain(self) -> None:
        """Everybody who holds something lets go of it; whoever demands must get it then."""
        for _ in range(20 * len(ALL)):
            for want in list(self.granted):
                self.granted.discard(want)
                self.tier.let_go(want)
            for read in self.reads:
                self.land(read)
            self.reads = []
            self.advance()
            self.check()


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_use_keeps_the_books_and_serves_every_demand(seed: int) -> None:
    machine = Machine(seed)
    for _ in range(200):
        machine.step()
    machine.drain()
    left = [want for want, urgency in machine.tier._wants.items() if urgency.demanded]
    assert not left, f"{machine.places} places and never served: {left}"


def test_nobody_is_evicted_while_he_is_held_or_read() -> None:
    tier = RamTier([64], 2)
    for expert in range(4):
        tier.want((Reader.CPU, ExpertId(0, expert)), demanded=True)
    _, reads = tier.next(0.0)
    assert [read.expert.expert for read in reads] == [0, 1]
    for read in reads:
        tier.landed(read)
    granted, more = tier.next(0.0)
    assert len(granted) == 2
    assert more == [], "both places are held"
    tier.let_go(granted[0])
    _, more = tier.next(0.0)
    assert [(read.expert.expert, read.place) for read in more] == [(2, reads[0].place)]


def test_who_settled_on_the_device_leaves_first_and_then_the_least_used() -> None:
    tier = RamTier([64], 3)
    for expert in range(3):
        tier.place(ExpertId(0, expert))
        tier.used(0, [expert], float(expert))
    tier.submitted(7)
    tier.arrived(ExpertId(0, 2), 7)
    tier.used(0, [2], 2.0 + SETTLED_TOKENS)

    def evicted_by(expert: int) -> int:
        there = {e for e in range(9) if tier.place_of(ExpertId(0, e)) is not None}
        tier.want((Reader.CPU, ExpertId(0, expert)), demanded=True)
        (read,) = tier.next(0.0)[1]
        (gone,) = there - {e for e in range(9) if tier.place_of(ExpertId(0, e)) is not None}
        tier.landed(read)
        tier.next(0.0)
        tier.let_go((Reader.CPU, ExpertId(0, expert)))
        return gone

    assert evicted_by(5) == 2
    assert evicted_by(6) == 5, "read, and never used since"
    tier.submitted(7)  # the slot is given away: its expert is nowhere but on disk
    assert evicted_by(2) == 6
    tier.arrived(ExpertId(0, 1), 7)
    assert evicted_by(8) != 1, "it only just came there"


def test_prefetches_leave_room_and_disk_to_demands() -> None:
    tier = RamTier([64], 8)
    for expert in range(6):
        tier.want((Reader.LINK, ExpertId(0, expert)), demanded=False, deadline_s=9.0 - expert)
    _, reads = tier.next(0.0)
    assert [read.expert.expert for read in reads] == [5, 4], "the earliest deadlines"
    assert len(reads) == PREFETCH_READS_IN_FLIGHT
    tier.want((Reader.CPU, ExpertId(0, 9)), demanded=True)
    assert [read.expert.expert for read in tier.next(0.0)[1]] == [9]
    tier.urge((Reader.LINK, ExpertId(0, 0)))
    assert [read.expert.expert for read in tier.next(0.0)[1]] == [0]


def test_shrinking_empties_places_as_soon_as_nobody_holds_them() -> None:
    tier = RamTier([64], 6)
    for expert in range(6):
        tier.place(ExpertId(0, expert))
    held = (Reader.LINK, ExpertId(0, 5))
    tier.want(held, demanded=True)
    tier.next(0.0)
    tier.resize(2)
    assert tier.used_up_to == 6
    tier.let_go(held)
    assert tier.used_up_to == 2
    assert [e for e in range(6) if tier.place_of(ExpertId(0, e)) is not None] == [0, 1]
    tier.resize(4)
    tier.want(held, demanded=True)
    ((read,),) = (tier.next(0.0)[1],)
    assert read.place in (2, 3)


def drive(supply: Supply, chunks: list[Chunk], ended: list[TransferEnded]) -> None:
    while (chunk := supply.queue.next_chunk()) is not None:
        chunks.append(chunk)
        done = supply.chunk_done(chunk, 1.0, failed=False)
        if done is not None:
            ended.append(done)


def submit(expert: int, cause: Cause, slot: int | None = None) -> Order:
    return Submit(ExpertId(0, expert), expert if slot is None else slot, 100, cause)


def test_a_transfer_waits_for_its_read_while_others_go_on() -> None:
    supply = Supply(TransferQueue(50), RamTier([100], 4))
    assert supply.tier is not None
    supply.tier.place(ExpertId(0, 1))
    chunks: list[Chunk] = []
    ended: list[TransferEnded] = []
    for order in (submit(0, Cause.DEMAND), submit(1, Cause.PREFETCH)):
        supply.apply(order, 0.5)
    (read,) = supply.reads(0.5)
    drive(supply, chunks, ended)
    assert [done.expert.expert for done in ended] == [1]
    supply.read_done(read)
    assert supply.reads(2.0) == []
    drive(supply, chunks, ended)
    assert [(done.expert.expert, done.bytes_s) for done in ended] == [(1, 0.5), (0, 2.0)]
    assert chunks[-1].ready_s == 2.0


def test_what_cannot_be_read_ends_its_transfer_and_is_named_to_the_cpu() -> None:
    supply = Supply(TransferQueue(50), RamTier([100], 4))
    supply.apply(submit(0, Cause.DEMAND), 0.0)
    supply.ask([ExpertId(0, 0), ExpertId(0, 1)])
    reads: Sequence[Read] = supply.reads(0.0)
    assert [read.expert.expert for read in reads] == [0, 1], "one read for both who want it"
    (ended,) = supply.read_failed(reads[0], 3.0, ModelFilesError("model.safetensors: it is gone."))
    assert ended == TransferEnded(ExpertId(0, 0), 0, Outcome.FAILED, 0, 3.0)
    with pytest.raises(ModelFilesError, match="it is gone"):
        supply.held([ExpertId(0, 0), ExpertId(0, 1)])
    supply.abandon()
    supply.read_done(reads[1])
    assert supply.reads(4.0) == []
    assert supply.tier is not None
    assert supply.tier.place_of(ExpertId(0, 1)) is not None, "what was read is kept"


@pytest.mark.parametrize("seed", range(40))
def test_every_transfer_ends_once_whatever_is_ordered(seed: int) -> None:
    chance = random.Random(seed)
    supply = Supply(TransferQueue(40), RamTier([100] * LAYERS, chance.choice([1, 2, 4, 18])))
    reads: list[Read] = []
    flying: list[Chunk] = []
    waiting: dict[ExpertId, int] = {}
    demanded: set[ExpertId] = set()

    def note(ended: TransferEnded | None) -> None:
        if ended is not None:
            assert waiting.pop(ended.expert) == ended.slot
            demanded.discard(ended.expert)

    def go(steps: int) -> None:
        for _ in range(steps):
            reads.extend(supply.reads(0.0))
            while (chunk := supply.queue.next_chunk()) is not None:
                assert supply.tier is not None
                assert supply.tier.holds((Reader.LINK, chunk.expert)), "copied without its bytes"
                flying.append(chunk)
            if reads and (not flying or chance.random() < 0.5):
                read = reads.pop(chance.randrange(len(reads)))
                if chance.random() < 0.1:
                    for ended in supply.read_failed(read, 0.0, ModelFilesError("")):
                        note(ended)
                else:
                    supply.read_done(read)
            elif flying:
                note(supply.chunk_done(flying.pop(0), 0.0, failed=chance.random() < 0.1))

    for number in range(150):
        expert = chance.choice(ALL)
        kind = chance.random()
        if kind < 0.5 and expert not in waiting:
            cause = chance.choice(list(Cause))
            waiting[expert] = number
            note(supply.apply(Submit(expert, number, 100, cause), 0.0))
            demanded |= {expert} if cause is Cause.DEMAND else set()
        elif kind < 0.65 and expert in waiting:
            supply.apply(Promote(expert), 0.0)
            demanded.add(expert)
        elif kind < 0.8 and expert not in demanded:
            note(supply.apply(Cancel(expert), 0.0))
        elif kind < 0.9:
            supply.apply(Hold(chance.random() < 0.5), 0.0)
        go(chance.randint(0, 3))
    go(600)
    assert not demanded, "demands go on under a hold"
    supply.apply(Hold(False), 0.0)
    for expert in list(waiting):
        supply.apply(Promote(expert), 0.0)
    go(600)
    assert not waiting
    assert supply.tier is not None
    slots = [supply.tier.table.slot(n) for n in range(supply.tier.table.capacity)]
    assert all(slot.pins == 0 for slot in slots)
    assert all(slot.state is not SlotState.LOADING for slot in slots)
