"""The transfer thread in real time, and the queue's order that both drivers share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import transfer as transfer_module
from runtime.core import ExpertId
from runtime.device_emulated import EmulatedDevice
from runtime.disk import Disk
from runtime.errors import TransferError
from runtime.link import Link, chunk_bytes_for
from runtime.ram_tier import RamTier
from runtime.transfer import TransferThread
from runtime.transfer_queue import (
    CHUNKS_IN_FLIGHT,
    Cancel,
    Cause,
    Chunk,
    Outcome,
    Promote,
    Submit,
    TransferEnded,
    TransferQueue,
)
from tests.machines import emulated_profile

EXPERT_BYTES, CHUNK_BYTES, SLOTS = 64_000, 8_000, 8


def expert_bytes(expert: ExpertId) -> torch.Tensor:
    return (torch.arange(EXPERT_BYTES) + expert.expert * 31).to(torch.uint8)


def demand(number: int, slot: int | None = None) -> Submit:
    place = number if slot is None else slot
    return Submit(ExpertId(0, number), place, EXPERT_BYTES, Cause.DEMAND)


def prefetch(number: int, deadline_s: float = 1.0) -> Submit:
    return Submit(ExpertId(0, number), number, EXPERT_BYTES, Cause.PREFETCH, deadline_s)


class Rig:
    """A transfer thread over an emulated card that can be held up or made to fail."""

    def __init__(self, link_bytes_per_s: float = 64e6) -> None:
        self.device = EmulatedDevice(emulated_profile(link_bytes_per_s))
        self.slab = self.device.allocate_slots(SLOTS, EXPERT_BYTES)
        self.link = Link(self.device, self.slab, expert_bytes, CHUNK_BYTES)
        self.issued: list[Chunk] = []
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()
        issue = self.link.issue

        def watched(chunk: Chunk) -> Any:
            self.gate.wait(5)
            self.issued.append(chunk)
            if self.failures:
                self.failures -= 1
                raise TransferError("a planted failure")
            return issue(chunk)

        self.link.issue = watched  # type: ignore[method-assign]
        self.thread = TransferThread(self.device, self.link, CHUNK_BYTES)

    def order(self, *orders: Any) -> float:
        """Give orders; return the time that the ledger counts from."""
        for order in orders:
            if isinstance(order, Submit):
                self.link.free(order.slot)
        ordered_s = self.device.now_s()
        self.thread.order(orders, ordered_s)
        return ordered_s

    def wait_for(self, count: int) -> list[TransferEnded]:
        ended: list[TransferEnded] = []
        while len(ended) < count:
            ended += self.thread.ended(self.device.now_s(), wait=True)
        return ended


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.thread.close()


def test_experts_arrive_whole_and_in_their_slots(rig: Rig) -> None:
    rig.order(*(demand(number) for number in range(SLOTS)))
    ended = rig.wait_for(SLOTS)
    assert [event.expert.expert for event in ended] == list(range(SLOTS))
    assert all(event.outcome is Outcome.LANDED for event in ended)
    for number in range(SLOTS):
        assert torch.equal(rig.slab[number], expert_bytes(ExpertId(0, number)))
    assert rig.thread.issued_bytes == SLOTS * EXPERT_BYTES
    assert rig.thread.pending_bytes == 0


def test_a_demand_overtakes_a_prefetch_within_the_chunks_on_the_stream(rig: Rig) -> None:
    rig.gate.clear()
    rig.order(prefetch(0))
    rig.order(demand(1))
    rig.gate.set()
    first, _ = rig.wait_for(2)  # both may have ended by the time anybody looks
    assert first.expert == ExpertId(0, 1)
    before = [c for c in rig.issued[: rig.issued.index(demand_chunk(rig))]]
    assert len(before) <= CHUNKS_IN_FLIGHT


def demand_chunk(rig: Rig) -> Chunk:
    return next(chunk for chunk in rig.issued if chunk.expert.expert == 1)


def test_a_copy_takes_as_long_as_the_ledger_says() -> None:
    rig = Rig(link_bytes_per_s=4e6)
    ordered_s = rig.order(demand(0), demand(1))
    ended = rig.wait_for(2)
    rig.thread.close()
    modelled_s = 2 * (EXPERT_BYTES / 4e6 + 0.0002)
    assert ended[-1].at_s - ordered_s == pytest.approx(modelled_s, abs=0.002)
    assert rig.device.now_s() >= ended[-1].at_s


def test_a_failed_copy_is_reported_and_the_thread_goes_on(rig: Rig) -> None:
    rig.failures = 1
    rig.order(demand(0))
    assert rig.wait_for(1)[0].outcome is Outcome.FAILED
    rig.order(demand(0))
    assert rig.wait_for(1)[0].outcome is Outcome.LANDED


def test_a_bug_in_the_thread_reaches_the_engine_thread(rig: Rig) -> None:
    def broken(chunk: Chunk) -> Any:
        raise AssertionError("a planted bug")

    rig.link.issue = broken  # type: ignore[method-assign]
    rig.order(demand(0))
    with pytest.raises(TransferError, match="planted bug"):
        rig.wait_for(1)


def test_an_error_of_the_system_in_a_reader_reaches_the_engine_thread(rig: Rig) -> None:
    def fill(expert: ExpertId, place: int) -> None:
        raise OSError("a planted error")

    disk = Disk(RamTier([EXPERT_BYTES], 4), fill)
    thread = TransferThread(rig.device, rig.link, CHUNK_BYTES, disk)
    with pytest.raises(TransferError, match="planted error"):
        thread.fetch([ExpertId(0, 0)], rig.device.now_s())
    thread.close()


def test_a_link_that_hangs_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "STALLED_S", 0.05)
    rig.gate.clear()
    rig.order(demand(0))
    with pytest.raises(TransferError, match="No expert arrived"):
        rig.wait_for(1)
    rig.gate.set()


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    rig = Rig()
    rig.order(demand(0))
    assert {t.name for t in set(threading.enumerate()) - before} == {"prescope-transfer"}
    rig.thread.close()
    assert set(threading.enumerate()) <= before


def test_a_chunk_lasts_about_100_us_and_is_aligned() -> None:
    assert chunk_bytes_for(25e9) == 2_500_000 // 64 * 64
    assert chunk_bytes_for(1e6) == 4096


ORDERS = st.lists(
    st.one_of(
        st.tuples(st.just("demand"), st.integers(0, 5)),
        st.tuples(st.just("prefetch"), st.integers(0, 5)),
        st.tuples(st.just("promote"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("chunk"), st.just(0)),
        st.tuples(st.just("land"), st.just(0)),
    ),
    max_size=60,
)


@given(ORDERS)
def test_the_queue_serves_demands_first_and_ends_everything_once(orders: Any) -> None:
    queue = TransferQueue(EXPERT_BYTES // 3)
    flying: list[Chunk] = []
    wanted: dict[int, bool] = {}
    ended_count = 0

    def note(ended: TransferEnded | None) -> None:
        nonlocal ended_count
        if ended is not None:
            ended_count += 1
            del wanted[ended.expert.expert]

    for what, number in orders:
        if what == "demand":
            wanted[number] = True
            note(queue.apply(demand(number), 0.0))
        elif what == "prefetch":
            wanted.setdefault(number, False)
            note(queue.apply(prefetch(number, deadline_s=float(number)), 0.0))
        elif what == "promote":
            if number in wanted:
                wanted[number] = True
            note(queue.apply(Promote(ExpertId(0, number)), 0.0))
        elif what == "cancel":
            note(queue.apply(Cancel(ExpertId(0, number)), 0.0))
        elif what == "chunk":
            chunk = queue.next_chunk()
            if chunk is not None:
                flying.append(chunk)
                if not wanted[chunk.expert.expert]:
                    demanded = [n for n, is_demand in wanted.items() if is_demand]
                    still = {c.expert.expert for c in flying}
                    assert set(demanded) <= still, "a prefetch went before a demand"
        elif flying:
            note(queue.landed(flying.pop(0), 0.0))
        assert len(flying) == queue.in_flight <= CHUNKS_IN_FLIGHT
        assert len(queue) == len(wanted)
    while len(queue):
        chunk = queue.next_chunk()
        if chunk is not None:
            flying.append(chunk)
        note(queue.landed(flying.pop(0), 0.0))
    assert queue.backlog_bytes == queue.pending_bytes == 0
