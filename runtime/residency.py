"""Which expert is where, decided from events: routed, transfer ended, computed, budget changed.

Pure: no torch, no threads, no clock of its own. Two drivers carry out what it decides, the
executor on a real or emulated device and the simulator on a ledger; both go through
`layer_run.run_layer`, so on one trace both count the same. The engine thread owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.cache import CacheTable, Slot, SlotState, UseHistory
from runtime.core import ExpertId, PolicyName
from runtime.scheduler import Costs, Miss, plan_misses
from runtime.telemetry import Counters
from runtime.transfer_queue import Cancel, Cause, Order, Outcome, Promote, Submit, TransferEnded

COPY_ATTEMPTS = 2


@dataclass(frozen=True)
class Steps:
    """What a driver does next: first the orders, so that the link starts, then the computing."""

    orders: tuple[Order, ...] = ()
    compute: tuple[tuple[ExpertId, int], ...] = ()
    cpu: tuple[ExpertId, ...] = ()


@dataclass
class _OpenLayer:
    """The layer being served: who still waits for a slot, for its bytes, or to be computed."""

    layer: int
    for_slot: deque[ExpertId] = field(default_factory=deque)
    for_bytes: set[ExpertId] = field(default_factory=set)
    to_compute: set[ExpertId] = field(default_factory=set)
    late: set[ExpertId] = field(default_factory=set)
    attempts: dict[ExpertId, int] = field(default_factory=dict)


class Residency:
    """Decides hits, loads and CPU work for one layer after another.

    `layer_bytes[l]` is the size of an expert of MoE layer l. `counters` is written here and read
    elsewhere; expert uses are counted when they are routed.
    """

    def __init__(
        self,
        cache: CacheTable,
        policy: PolicyName,
        costs: Costs,
        layer_bytes: Sequence[int],
        counters: Counters,
    ) -> None:
        self.cache = cache
        self.policy: PolicyName = policy
        self.counters = counters
        self.history = UseHistory()
        self._costs = costs
        self._layer_bytes = tuple(layer_bytes)
        self._open: _OpenLayer | None = None

    @property
    def waits(self) -> bool:
        """True while the open layer has an expert whose bytes have not come."""
        return self._open is not None and bool(self._open.for_slot or self._open.for_bytes)

    def begin_pass(self) -> None:
        """Note that a forward pass starts; use ages by passes."""
        self.counters.forward_passes += 1

    def routed(self, layer: int, demands: Mapping[int, int], backlog_bytes: int) -> Steps:
        """Open a layer whose router chose `demands` (expert -> tokens); decide every expert.

        Hits come back as `compute` at once and are pinned until `computed`.
        """
        assert self._open is None, f"layer {self._open} is still open"
        self._open = _OpenLayer(layer)
        hits, orders, misses = [], [], []
        for number, tokens in demands.items():
            expert = ExpertId(layer, number)
            self.history.use(expert, self.counters.forward_passes)
            slot_number = self.cache.find(expert)
            if slot_number is None:
                misses.append(Miss(number, tokens))
                continue
            self.cache.touch(expert)
            self.cache.pin(slot_number)
            if self.cache.slot(slot_number).state is SlotState.READY:
                self._count_hit(self.cache.slot(slot_number))
                self._open.to_compute.add(expert)
                hits.append((expert, slot_number))
            else:
                self._join(expert, self.cache.slot(slot_number))
                orders.append(Promote(expert))
        self.counters.routed += len(demands)
        if not misses:
            return Steps(tuple(orders), tuple(hits))
        size = self._layer_bytes[layer]
        free = self.cache.has_free
        plan = plan_misses(self.policy, misses, size, self._costs, backlog_bytes, free)
        self._open.for_slot.extend(ExpertId(layer, number) for number in plan.load)
        self.counters.served_on_demand += len(plan.load)
        cpu = self._to_cpu([ExpertId(layer, number) for number in plan.cpu])
        return Steps((*orders, *self._fill_slots()), tuple(hits), cpu)

    def prefetch(self, experts: Sequence[ExpertId], deadline_s: float) -> Steps:
        """Start copying experts that are not here, as far as slots can be had, by a deadline.

        The bytes count as used, late or wasted once that shows.
        """
        orders: list[Order] = []
        if self._open is not None and self._open.for_slot:
            return Steps()
        for expert in experts:
            if self.cache.find(expert) is not None:
                continue
            number = self._reserve(expert)
            if number is None:
                break
            size = self._layer_bytes[expert.layer]
            self.cache.slot(number).unused_prefetch_bytes = size
            orders.append(Submit(expert, number, size, Cause.PREFETCH, deadline_s))
        return Steps(tuple(orders))

    def cancel_prefetches(self) -> Steps:
        """Give up every copy under way that nobody waits for."""
        return Steps(tuple(Cancel(expert) for expert in self.cache.unawaited()))

    def computed(self, expert: ExpertId) -> Steps:
        """Note that an expert's compute was launched: its slot may be filled anew.

        The driver has recorded the slot's last-read fence, which the next copy waits for.
        """
        assert self._open is not None
        assert expert in self._open.to_compute, expert
        self._open.to_compute.discard(expert)
        self._unpin(expert)
        return Steps(self._fill_slots())

    def ended(self, event: TransferEnded) -> Steps:
        """Note that a transfer landed, was cancelled or failed."""
        slot = self.cache.slot(event.slot)
        assert slot.expert == event.expert, (event, slot)
        assert slot.state is SlotState.LOADING, (event, slot)
        needed = self._open is not None and event.expert in self._open.for_bytes
        if event.outcome is Outcome.LANDED:
            return self._landed(event, needed)
        if event.outcome is Outcome.CANCELLED:
            self.counters.link_bytes_cancelled += event.issued_bytes
        else:
            self.counters.link_bytes_failed += event.issued_bytes
            self.counters.copies_failed += 1
        if needed:
            self.cache.unpin(event.slot)
        self.cache.release(event.slot)
        if not needed:
            return Steps(self._fill_slots())
        return self._again(event)

    def layer_done(self) -> None:
        """Close the layer; every routed expert has been computed."""
        assert self._open is not None
        left = (self._open.for_slot, self._open.for_bytes, self._open.to_compute)
        assert not any(left), f"layer {self._open.layer} closed with {left}"
        self._open = None

    def abandon_layer(self) -> None:
        """Forget the open layer after a failure; landed and loading experts keep their slots."""
        if self._open is not None:
            for expert in self._open.to_compute | self._open.for_bytes:
                self._unpin(expert)
            self._open = None

    def resize(self, slots: int) -> Steps:
        """Use only `slots` of the allocated slots from now on."""
        for evicted in self.cache.resize(slots):
            self._count_eviction(evicted)
        return Steps(self._fill_slots())

    def _join(self, expert: ExpertId, slot: Slot) -> None:
        """Wait for a copy that is under way already."""
        assert self._open is not None
        self._open.for_bytes.add(expert)
        if slot.unused_prefetch_bytes:
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
            self._open.to_compute.add(event.expert)
            if slot.unused_prefetch_bytes:
                slot.unused_prefetch_bytes = 0
                self.counters.link_bytes_prefetch_late += event.issued_bytes
            else:
                self.counters.link_bytes_on_demand += event.issued_bytes
            return Steps((), ((event.expert, event.slot),))
        if not slot.unused_prefetch_bytes:
            # Asked for on demand by a layer that was abandoned: it moved for that demand.
            self.counters.link_bytes_on_demand += event.issued_bytes
        self._trim()
        return Steps(self._fill_slots())

    def _again(self, event: TransferEnded) -> Steps:
        """Repeat a copy that was needed and did not land; after that the CPU computes it."""
        assert self._open is not None
        self._open.for_bytes.discard(event.expert)
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
        if self._open is None:
            return ()
        orders: list[Order] = []
        while self._open.for_slot:
            expert = self._open.for_slot[0]
            number = self._reserve(expert)
            if number is None:
                break
            self._open.for_slot.popleft()
            self._open.for_bytes.add(expert)
            self.cache.pin(number)
            size = self._layer_bytes[expert.layer]
            orders.append(Submit(expert, number, size, Cause.DEMAND))
        return tuple(orders)

    def _reserve(self, expert: ExpertId) -> int | None:
        reserved = self.cache.reserve(expert)
        if reserved is None:
            return None
        number, victim = reserved
        if victim is not None:
            self._count_eviction(victim)
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
            self._count_eviction(evicted)

    def _count_hit(self, slot: Slot) -> None:
        if slot.unused_prefetch_bytes:
            self.counters.served_prefetch_in_time += 1
            self.counters.link_bytes_prefetch_used += slot.unused_prefetch_bytes
            slot.unused_prefetch_bytes = 0
        else:
            self.counters.served_resident += 1

    def _count_eviction(self, victim: Slot) -> None:
        self.counters.evictions += 1
        self.counters.link_bytes_prefetch_wasted += victim.unused_prefetch_bytes
