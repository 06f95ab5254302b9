"""Residency, cache table, queue and link as one state machine over a device that checks fences.

Any order of routing, computing, landing, prefetching, cancelling, failing and resizing must keep
the invariants; each planted bug must break one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from runtime.cache import CacheTable, Slot, SlotState
from runtime.core import ExpertId, PolicyName
from runtime.device import Stream
from runtime.device_emulated import EmulatedDevice, HazardError
from runtime.errors import TransferError
from runtime.eviction_table import EVICTIONS, make_eviction
from runtime.link import Link
from runtime.policy import Moment, Policy, PolicySetup, Reactive, Routed, Wish
from runtime.policy_moe_infinity import MoeInfinity
from runtime.policy_prescope import PreScope
from runtime.residency import Residency
from runtime.residency_books import Books
from runtime.residency_layer import Steps
from runtime.scheduler import Costs, MissPlan
from runtime.telemetry import Counters
from runtime.trace import Guess, LayerStep, Prediction
from runtime.transfer import virtual_transfer
from runtime.transfer_queue import Outcome, Submit
from tests.machines import emulated_profile

LAYERS, EXPERTS, SLOTS = 3, 5, 6
EXPERT_BYTES, CHUNK_BYTES = 192, 64


class FaultyDevice(EmulatedDevice):
    """An emulated card whose next copies fail on request, with or without pinned memory."""

    def __init__(self, pinned: bool) -> None:
        super().__init__(emulated_profile(), virtual_clock=True)
        self.pinned = pinned
        self.failures = 0

    def is_pinned(self, host: torch.Tensor) -> bool:
        return self.pinned

    def copy(self, *args: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise TransferError("a planted failure")
        return super().copy(*args)


def expert_bytes(expert: ExpertId) -> torch.Tensor:
    """Bytes that tell the expert and the place, so that a wrong or partial copy shows."""
    start = (expert.layer * EXPERTS + expert.expert) * 7
    return (torch.arange(EXPERT_BYTES) + start).to(torch.uint8)


class Wild(Reactive):
    """Decides at random, so that whatever a policy may do is done some time."""

    name: PolicyName = "prescope"
    predicts = True
    copies_ahead = True

    def __init__(self, seed: int, eviction: str) -> None:
        self.eviction = make_eviction(eviction, (EXPERTS,) * LAYERS)
        self.draw = random.Random(seed)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        missing = list(routed.misses)
        self.draw.shuffle(missing)
        cut = self.draw.randint(0, len(missing))
        given_up = [number for number in routed.coming if self.draw.random() < 0.3]
        along = tuple(range(EXPERTS)) if self.draw.random() < 0.1 else ()
        hold = self.draw.random() < 0.5
        return MissPlan(tuple(missing[:cut]), (*missing[cut:], *given_up), along, hold)

    def beside(self, *told: Any) -> Sequence[Wish]:
        return self._wishes()

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        return self._wishes()

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        return self._wishes()

    def protects(self, expert: ExpertId) -> bool:
        return self.draw.random() < 0.3

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        return self.draw.random() < 0.7

    def _wishes(self) -> list[Wish]:
        number = self.draw.randint(0, 3)
        draw = self.draw
        return [
            Wish(ExpertId(draw.randrange(LAYERS), draw.randrange(EXPERTS)), draw.random(), 0.5)
            for _ in range(number)
        ]


SETUP = PolicySetup(
    (EXPERTS,) * LAYERS, 2, (EXPERT_BYTES,) * LAYERS, SLOTS, Costs.of(emulated_profile())
)


class ResidencyMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.builds(Wild, st.integers(0, 999), st.sampled_from(sorted(EVICTIONS)))
        | st.builds(PreScope, st.just(SETUP))
        | st.builds(MoeInfinity, st.just(SETUP)),
        pinned=st.booleans(),
    )
    def build(self, policy: Policy, pinned: bool) -> None:
        self.device = FaultyDevice(pinned)
        self.slab = self.device.allocate_slots(SLOTS, EXPERT_BYTES)
        self.link = Link(self.device, self.slab, expert_bytes, CHUNK_BYTES)
        self.transfer = virtual_transfer(self.device, self.link, CHUNK_BYTES)
        self.counters = Counters()
        sizes = [EXPERT_BYTES] * LAYERS
        cache = CacheTable(SLOTS, policy.eviction)
        self.residency = Residency(cache, policy, sizes, self.counters)
        self.to_compute: list[tuple[ExpertId, int]] = []
        self.open = False
        self.routed = 0

    def carry_out(self, steps: Steps) -> None:
        for order in steps.orders:
            if isinstance(order, Submit):
                self.link.free(order.slot)
        self.transfer.order(steps.orders, self.device.now_s())
        self.to_compute.extend(steps.compute)

    def land(self, wait: bool) -> None:
        for event in self.transfer.ended(self.device.now_s(), wait):
            if event.outcome is Outcome.LANDED:
                self.link.take_done(event.slot)
            self.device.reached(event.at_s)
            self.carry_out(self.residency.ended(event))

    @precondition(lambda self: not self.open)
    @rule(
        layer=st.integers(0, LAYERS - 1),
        demands=st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 40), min_size=1),
        guesses=st.lists(
            st.builds(
                Prediction.of,
                st.integers(0, LAYERS - 1),
                st.integers(1, 2),
                st.lists(
                    st.builds(Guess, st.integers(0, EXPERTS - 1), st.floats(0, 1)),
                    max_size=4,
                    unique_by=lambda guess: guess.expert,
                ).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
    )
    def route(self, layer: int, demands: dict[int, int], guesses: tuple[Prediction, ...]) -> None:
        self.device.begin_layer(1)
        self.carry_out(self.residency.begin_pass(1, guesses, self.moment()))
        self.land(wait=False)
        self.open = True
        self.routed += len(demands)
        step = LayerStep(dict(sorted(demands.items())), guesses)
        self.carry_out(self.residency.routed(layer, step, self.moment()))

    def moment(self) -> Moment:
        return Moment(
            self.residency.token,
            1,
            False,
            self.device.now_s(),
            self.device.busy_until_s(),
            self.transfer.state(self.device.now_s()),
            self.residency.cache.free_slots,
            self.residency.cache.here,
            self.residency.cache.held,
        )

    @precondition(lambda self: self.to_compute)
    @rule()
    def compute_one(self) -> None:
        expert, slot = self.to_compute.pop(0)
        seen: list[torch.Tensor] = []
        self.device.launch(slot, EXPERT_BYTES, 1, lambda: seen.append(self.slab[slot].clone()))
        assert torch.equal(seen[0], expert_bytes(expert)), f"slot {slot} does not hold {expert}"
        self.carry_out(self.residency.computed([expert]))

    @rule()
    def poll(self) -> None:
        self.land(wait=False)

    @precondition(lambda self: self.residency.waits and not self.to_compute)
    @rule()
    def wait_for_one(self) -> None:
        self.land(wait=True)

    @precondition(lambda self: self.open and not self.to_compute and not self.residency.waits)
    @rule()
    def close_layer(self) -> None:
        self.open = False
        self.carry_out(self.residency.layer_done(self.moment()))

    @precondition(lambda self: self.open)
    @rule()
    def abandon(self) -> None:
        self.carry_out(self.residency.abandon_layer())
        self.to_compute.clear()
        self.open = False

    @precondition(lambda self: not self.open)
    @rule(seed=st.integers(0, 999), eviction=st.sampled_from(sorted(EVICTIONS)))
    def follow_another_policy(self, seed: int, eviction: str) -> None:
        self.carry_out(self.residency.follow(Wild(seed, eviction)))

    @rule()
    def cancel_prefetches(self) -> None:
        self.carry_out(self.residency.cancel_prefetches())

    @rule(failures=st.integers(1, 3))
    def fail_next_copies(self, failures: int) -> None:
        self.device.failures = failures

    @rule(slots=st.integers(1, SLOTS))
    def resize(self, slots: int) -> None:
        self.carry_out(self.residency.resize(slots))

    @invariant()
    def table_is_consistent(self) -> None:
        if hasattr(self, "residency"):
            cache = self.residency.cache
            cache.check()
            slots = [cache.slot(number) for number in range(SLOTS)]
            beyond = slots[cache.capacity :]
            assert all(s.pins or s.state is not SlotState.READY for s in beyond), "not shrunk"

    @invariant()
    def ready_slots_hold_their_expert(self) -> None:
        if not hasattr(self, "residency"):
            return
        for number in range(SLOTS):
            slot = self.residency.cache.slot(number)
            if slot.state is SlotState.READY and slot.expert is not None:
                assert torch.equal(self.slab[number], expert_bytes(slot.expert)), (number, slot)

    @invariant()
    def accounting_closes(self) -> None:
        if not hasattr(self, "residency"):
            return
        c = self.counters
        assert sum(c.served) == c.routed == self.routed, c
        slots = [self.residency.cache.slot(number) for number in range(SLOTS)]
        unused = sum(s.unused_prefetch_bytes for s in slots if s.state is SlotState.READY)
        settled = (
            c.link_bytes_on_demand
            + c.link_bytes_prefetch_used
            + c.link_bytes_prefetch_late
            + c.link_bytes_prefetch_wasted
            + c.link_bytes_cancelled
            + c.link_bytes_failed
        )
        pending = self.transfer.pending_bytes + unused
        assert self.transfer.issued_bytes == settled + pending, (c, pending)

    def teardown(self) -> None:
        """Everything must come to rest: no transfer may hang and no slot may leak."""
        if not hasattr(self, "residency"):
            return
        self.device.failures = 0
        for _ in range(100):
            while self.to_compute:
                self.compute_one()
            if not self.residency.waits:
                break
            self.land(wait=True)
        if self.open:
            self.carry_out(self.residency.layer_done(self.moment()))
        self.device.reached(self.device.now_s() + 1e6)
        self.land(wait=False)
        assert self.transfer.pending_bytes == 0
        states = [self.residency.cache.slot(number) for number in range(SLOTS)]
        assert not any(s.pins or s.state is SlotState.LOADING for s in states), states
        self.accounting_closes()


QUICK = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
HUNT = settings(QUICK, max_examples=1500, phases=[Phase.generate], database=None)


def test_any_interleaving_keeps_the_invariants() -> None:
    run_state_machine_as_test(ResidencyMachine, settings=QUICK)  # type: ignore[no-untyped-call]


@contextmanager
def planted(owner: type, name: str, mutant: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, mutant)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_wait_before_reading(self: Link, slot: int) -> None:
    self._done.pop(slot)


def no_wait_before_writing(self: EmulatedDevice, stream: Stream, fence: Any) -> None:
    if stream is Stream.COMPUTE:
        ORIGINAL_WAIT(self, stream, fence)


def evicts_pinned(self: CacheTable, now: float, layer: int, protected: Any = None) -> Any:
    ready = SlotState.READY
    return self.eviction.victim(lambda e: self._slots[self._where[e]].state is ready, now, layer)


def leaks_on_failure(self: Residency, event: Any) -> Steps:
    if event.outcome is Outcome.FAILED:
        self.counters.link_bytes_failed += event.issued_bytes
        return Steps()
    return ORIGINAL_ENDED(self, event)


def loses_waste(self: Books, victim: Slot) -> None:
    self.counters.evictions += 1


def shrinks_nothing(self: CacheTable) -> list[Slot]:
    return []


def frees_twice(self: CacheTable, number: int) -> Slot:
    slot = ORIGINAL_RELEASE(self, number)
    self._free.append(number)
    return slot


def reuses_staging(self: EmulatedDevice, fence: Any) -> float:
    return float(fence.at_s)


def copies_to_the_start(self: Link, chunk: Any) -> Any:
    begins_s, fence = ORIGINAL_ISSUE(self, chunk)
    self._slots[chunk.slot, : chunk.size_bytes] = 0
    return begins_s, fence


def forgets_to_count(self: Residency, expert: ExpertId, orders: Any) -> None:
    assert self._open is not None
    number = self.cache.find(expert)
    assert number is not None
    self.cache.pin(number)
    self._open.for_bytes.add(expert)


def forgets_probation(self: CacheTable, number: int) -> None:
    self._slots[number].state = SlotState.READY


ORIGINAL_WAIT = EmulatedDevice.wait
ORIGINAL_ENDED = Residency.ended
ORIGINAL_RELEASE = CacheTable.release
ORIGINAL_ISSUE = Link.issue

PLANTED_BUGS = {
    "no read-after-write wait": (Link, "take_done", no_wait_before_reading),
    "no write-after-read wait": (EmulatedDevice, "wait", no_wait_before_writing),
    "a pinned slot is evicted": (CacheTable, "victim", evicts_pinned),
    "a failed copy leaks its slot": (Residency, "ended", leaks_on_failure),
    "wasted prefetches are not counted": (Books, "evicted", loses_waste),
    "shrinking keeps the slots": (CacheTable, "trim", shrinks_nothing),
    "a slot is freed twice": (CacheTable, "release", frees_twice),
    "a staging buffer is reused too early": (EmulatedDevice, "synchronize", reuses_staging),
    "a chunk goes to the wrong place": (Link, "issue", copies_to_the_start),
    "a late prefetch is not counted": (Residency, "_join", forgets_to_count),
    "a landed slot still counts as loading": (CacheTable, "landed", forgets_probation),
}


@pytest.mark.parametrize("bug", PLANTED_BUGS)
def test_each_planted_bug_is_caught(bug: str) -> None:
    owner, name, mutant = PLANTED_BUGS[bug]
    with planted(owner, name, mutant), pytest.raises((AssertionError, HazardError, KeyError)):
        run_state_machine_as_test(ResidencyMachine, settings=HUNT)  # type: ignore[no-untyped-call]
