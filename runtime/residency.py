"""Which expert is where, decided from events: routed, transfer ended, computed, budget changed.

Pure: no torch, no threads, no clock of its own. Two drivers carry out what it decides, the
executor on a real or emulated device and the simulator on a ledger; both go through
`layer_run.run_layer`, so on one trace both count the same. The engine thread owns it. A policy
chooses; here the books are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.cache import CacheTable, SlotState
from runtime.core import ExpertId
from runtime.eviction import Floats
from runtime.policy import Moment, Policy, Routed, Wish
from runtime.residency_books import Books
from runtime.residency_layer import OpenLayer, Steps
from runtime.telemetry import Counters
from runtime.trace import LayerStep, Prediction
from runtime.transfer_queue import (
    Cancel,
    Cause,
    Hold,
    Order,
    Outcome,
    Promote,
    Submit,
    TransferEnded,
)

COPY_ATTEMPTS = 2
NOTHING = Steps()


class Residency:
    """Decides hits, loads and CPU work for one layer after another.

    `layer_bytes[l]` is the size of an expert of MoE layer l. `counters` is written here and read
    elsewhere; expert uses are counted when they are routed. `token` counts tokens, the clock that
    uses age by.
    """

    def __init__(
        self, cache: CacheTable, policy: Policy, layer_bytes: Sequence[int], counters: Counters
    ) -> None:
        self.cache = cache
        self.policy = policy
        self.counters = counters
        self.token = 0.0
        self.prompt = False
        self.books = Books(counters)
        self.stall_s_by_layer = [0.0] * len(layer_bytes)
        self._layer_bytes = tuple(layer_bytes)
        self._open: OpenLayer | None = None

    @property
    def waits(self) -> bool:
        """True while the open layer has an expert whose bytes have not come."""
        return self._open is not None and bool(self._open.for_slot or self._open.for_bytes)

    @property
    def needs_slot(self) -> bool:
        """True while the open layer has an expert that waits for a slot."""
        return self._open is not None and bool(self._open.for_slot)

    def follow(self, policy: Policy) -> Steps:
        """Serve misses as another policy says from the next layer on; give up what was under way
        for the old one."""
        assert self._open is None, f"layer {self._open} is open"
        steps = self.cancel_prefetches()
        self.policy = policy
        self.cache.evict_by(policy.eviction, self.token)
        return steps

    def begin_pass(self, span: int, predictions: Sequence[Prediction], moment: Moment) -> Steps:
        """Note that a forward pass starts, `span` tokens after the one before."""
        self.counters.forward_passes += 1
        self.token += span
        self.books.expect(predictions)
        return self._prefetch(self.policy.begin_pass(predictions, moment), moment, 0)

    def routed(self, layer: int, step: LayerStep, moment: Moment) -> Steps:
        """Open a layer whose router chose `step.demands`; decide every expert.

        Hits come back as `compute` at once and are pinned until `computed`. A transfer of which
        no byte is on the link yet makes its expert a miss like any other. What is copied ahead is
        for `ahead` to say, once the layer's own work is on its way.
        """
        assert self._open is None, f"layer {self._open} is still open"
        cache, demands, unstarted = self.cache, step.demands, moment.queue.unstarted
        here, slots = cache.here(layer), cache.slots
        hits: list[int] = []
        coming: list[int] = []
        misses: list[int] = []
        compute: list[tuple[ExpertId, int]] = []
        found = 0
        for number in demands:
            place = here.get(number)
            if place is None:
                misses.append(number)
                continue
            slot = slots[place]
            assert slot.expert is not None
            if slot.state is SlotState.READY:
                hits.append(number)
                compute.append((slot.expert, place))
                if slot.unused_prefetch_bytes:
                    self.books.found(slot)
                    found += 1
            else:
                (misses if slot.expert in unstarted else coming).append(number)
        chosen = step.chosen
        cache.eviction.used_all(layer, chosen, self.token, _weights(step))
        if hits:
            cache.pin_all(layer, hits)
        self.books.routed(layer, step, [*coming, *misses], found)
        routed = Routed(layer, demands, chosen, hits, coming, misses)
        plan = self.policy.place(routed, moment)
        opened = self._open = OpenLayer(layer, routed, plan, step.predictions, moment)
        opened.to_compute.update([expert for expert, _ in compute])
        if not (coming or misses or plan.along or unstarted):
            return Steps((), tuple(compute))
        orders: list[Order] = []
        if plan.hold:
            opened.held = True
            orders.append(Hold(True))
        for number in coming:
            if number not in plan.cpu:
                self._join(ExpertId(layer, number), orders)
        if unstarted:
            orders += self._drop_unwanted(layer, plan.load, unstarted)
        for number in plan.load:
            expert = ExpertId(layer, number)
            if cache.holds(expert):
                self._join(expert, orders)
            else:
                opened.for_slot.append(expert)
                self.counters.served_on_demand += 1
        if plan.along:
            wanted = {ExpertId(layer, number) for number in plan.along} - set(opened.for_slot)
            opened.along = {expert for expert in wanted if not cache.holds(expert)}
            opened.for_slot.extend(sorted(opened.along))
        cpu = self._to_cpu([ExpertId(layer, number) for number in plan.cpu])
        orders += self._fill_slots()
        return Steps(tuple(orders), tuple(compute), cpu)

    def ahead(self) -> Steps:
        """Choose what to copy while the open layer is served, as it was when it was routed."""
        opened = self._open
        assert opened is not None
        if opened.for_slot:
            return Steps()
        wishes = self.policy.beside(opened.routed, opened.plan, opened.predictions, opened.moment)
        return self._prefetch(wishes, opened.moment, opened.layer)

    def cancel_prefetches(self) -> Steps:
        """Give up every copy under way that nobody waits for."""
        return Steps(tuple(Cancel(expert) for expert in self.cache.unawaited()))

    def computed(self, experts: Sequence[ExpertId]) -> Steps:
        """Note that the compute of these was launched: their slots may be filled anew.

        The driver has recorded the slots' last-read fences, which the next copies wait for.
        """
        opened = self._open
        assert opened is not None
        assert opened.to_compute.issuperset(experts), experts
        opened.to_compute.difference_update(experts)
        self.cache.unpin_all(opened.layer, [number for _, number in experts])
        self._trim()
        return Steps(self._fill_slots()) if opened.for_slot else NOTHING

    def ended(self, event: TransferEnded) -> Steps:
        """Note that a transfer landed, was cancelled or failed."""
        slot = self.cache.slot(event.slot)
        assert slot.expert == event.expert, (event, slot)
        assert slot.state is SlotState.LOADING, (event, slot)
        needed = self._open is not None and event.expert in self._open.for_bytes
        if event.outcome is Outcome.LANDED:
            return self._landed(event, needed)
        self.books.lost(event)
        if needed:
            self.cache.unpin(event.slot)
        self.cache.release(event.slot)
        if not needed:
            return Steps(self._fill_slots())
        return self._again(event)

    def stalled(self, seconds: float, disk_s: float = 0.0) -> None:
        """Note that the open layer had nothing to do for so long but to wait for the link, or for
        the disk: for `disk_s` of it, if that is not more."""
        assert self._open is not None
        self.counters.stall_s += seconds
        self.counters.disk_stall_s += min(seconds, max(0.0, disk_s))
        self.stall_s_by_layer[self._open.layer] += seconds

    def layer_done(self, moment: Moment) -> Steps:
        """Close the layer, every routed expert of which has been computed; copy ahead."""
        assert self._open is not None
        left = (self._open.for_slot, self._open.for_bytes, self._open.to_compute)
        assert not any(left), f"layer {self._open.layer} closed with {left}"
        layer, held = self._open.layer, self._open.held
        self._open = None
        ahead = self._prefetch(self.policy.between(layer, moment), moment, layer)
        return Steps((Hold(False), *ahead.orders)) if held else ahead

    def abandon_layer(self) -> Steps:
        """Forget the open layer after a failure; landed and loading experts keep their slots."""
        if self._open is None:
            return Steps()
        for expert in self._open.to_compute | self._open.for_bytes:
            self._unpin(expert)
        held, self._open = self._open.held, None
        return Steps((Hold(False),) if held else ())

    def resize(self, slots: int) -> Steps:
        """Use only `slots` of the allocated slots from now on."""
        for evicted in self.cache.resize(slots):
            self.books.evicted(evicted)
        return Steps(self._fill_slots())

    def _prefetch(self, wishes: Sequence[Wish], moment: Moment, layer: int) -> Steps:
        """Start copying wishes, as far as slots can be had from those worth less."""
        orders: list[Order] = []
        victim = None
        for wish in wishes:
            expert = wish.expert
            if self.cache.holds(expert):
                continue
            if not self.cache.free_slots:
                victim = victim or self.cache.victim(self.token, layer, self.policy.protects)
                if victim is None:
                    break
                if not self.policy.displaces(wish, victim, moment):
                    continue
            number = self._reserve(expert, victim, prefetched=not wish.stays)
            victim = None
            size = self._layer_bytes[expert.layer]
            self.cache.slot(number).unused_prefetch_bytes = size
            self.counters.prefetches += 1
            orders.append(Submit(expert, number, size, Cause.PREFETCH, wish.deadline_s))
        return Steps(tuple(orders))

    def _drop_unwanted(
        self, layer: int, wanted: Sequence[int], unstarted: frozenset[ExpertId]
    ) -> list[Order]:
        """Cancel copies of this layer's experts that have not begun and came too late."""
        assert self._open is not None
        keep = self._open.for_bytes | {ExpertId(layer, number) for number in wanted}
        return [
            Cancel(expert)
            for expert in self.cache.unawaited()
            if expert.layer == layer and expert not in keep and expert in unstarted
        ]

    def _join(self, expert: ExpertId, orders: list[Order]) -> None:
        """Wait for a copy that is under way, or at least ordered, already."""
        assert self._open is not None
        number = self.cache.find(expert)
        assert number is not None, f"{expert} is not on its way"
        self.cache.pin(number)
        self._open.for_bytes.add(expert)
        orders.append(Promote(expert))
        if self.cache.slot(number).unused_prefetch_bytes:
            self._open.late.add(expert)
            self.counters.served_prefetch_late += 1
        else:
            self.counters.served_on_demand += 1

    def _landed(self, event: TransferEnded, needed: bool) -> Steps:
        self.cache.landed(event.slot)
        slot = self.cache.slot(event.slot)
        if needed:
            assert self._open is not None
            self._open.for_bytes.discard(event.expert)
            self.books.awaited(slot, event)
            if event.expert in self._open.along:
                self._unpin(event.expert)
                return Steps(self._fill_slots())
            self._open.to_compute.add(event.expert)
            return Steps((), ((event.expert, event.slot),))
        self.books.unawaited(slot, event)
        self._trim()
        return Steps(self._fill_slots())

    def _again(self, event: TransferEnded) -> Steps:
        """Repeat a copy that was needed and did not land; after that the CPU computes it."""
        assert self._open is not None
        self._open.for_bytes.discard(event.expert)
        if event.expert in self._open.along:
            return Steps(self._fill_slots())
        if event.expert in self._open.late:
            self._open.late.discard(event.expert)
            self.counters.served_prefetch_late -= 1
            self.counters.served_on_demand += 1
        attempts = self._open.attempts.get(event.expert, 1)
        if attempts < COPY_ATTEMPTS:
            self._open.attempts[event.expert] = attempts + 1
            self._open.for_slot.appendleft(event.expert)
            return Steps(self._fill_slots())
        self.counters.served_on_demand -= 1
        return Steps(self._fill_slots(), (), self._to_cpu([event.expert]))

    def _fill_slots(self) -> tuple[Order, ...]:
        """Start the loads of the open layer that a slot can be had for."""
        opened = self._open
        if opened is None:
            return ()
        orders: list[Order] = []
        while opened.for_slot:
            expert = opened.for_slot[0]
            victim = None
            if not self.cache.free_slots:
                victim = self.cache.victim(self.token, opened.layer, self.policy.protects)
                victim = victim or self.cache.victim(self.token, opened.layer)
                if victim is None:
                    # Copies that nobody waits for, held perhaps, must not keep a demand waiting.
                    given_up = self.cache.unawaited()[: len(opened.for_slot)]
                    orders.extend(Cancel(each) for each in given_up)
                    break
            opened.for_slot.popleft()
            opened.for_bytes.add(expert)
            number = self._reserve(expert, victim, prefetched=False)
            self.cache.pin(number)
            size = self._layer_bytes[expert.layer]
            orders.append(Submit(expert, number, size, Cause.DEMAND))
        return tuple(orders)

    def _reserve(self, expert: ExpertId, victim: ExpertId | None, *, prefetched: bool) -> int:
        number, evicted = self.cache.reserve(expert, victim, self.token, prefetched=prefetched)
        if evicted is not None:
            self.books.evicted(evicted)
        return number

    def _to_cpu(self, experts: list[ExpertId]) -> tuple[ExpertId, ...]:
        self.counters.served_cpu += len(experts)
        return tuple(experts)

    def _unpin(self, expert: ExpertId) -> None:
        number = self.cache.find(expert)
        assert number is not None, f"{expert} was evicted while it was pinned"
        self.cache.unpin(number)
        self._trim()

    def _trim(self) -> None:
        for evicted in self.cache.trim():
            self.books.evicted(evicted)


def _weights(step: LayerStep) -> Floats | None:
    """Return the recency weights of a layer's routed experts, if its step has any."""
    if step.recency is None:
        return None
    return np.array([step.recency.get(number, 0.0) for number in step.demands])
