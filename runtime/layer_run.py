"""The one order in which a layer's steps are done, whoever does them.

Hits start at once and never wait for a copy; the CPU computes while copies fly; loaded experts are
computed as they land; what is copied ahead is decided once the device has its work. What RAM does
not hold is read from disk meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from runtime.core import ExpertId
from runtime.policy import Moment
from runtime.residency import Residency
from runtime.residency_layer import Steps
from runtime.trace import LayerStep, Prediction
from runtime.transfer_queue import Order, QueueState, TransferEnded


class LayerPorts(Protocol):
    """What `run_layer` needs done. The executor does it; the simulator charges it."""

    def now_s(self) -> float: ...

    def busy_until_s(self) -> float:
        """Return when the device will have computed all it was given, as far as it can foresee."""
        ...

    def watch_compute(self) -> Callable[[], float]:
        """Return what tells, after a wait, since when the device had nothing left to compute."""
        ...

    def queue_state(self) -> QueueState:
        """Return what waits for the link."""
        ...

    def link_totals(self) -> tuple[int, float]:
        """Return the bytes the link was given since the start and the seconds it was busy."""
        ...

    def order(self, orders: Sequence[Order]) -> None:
        """Pass orders to the transfer queue."""
        ...

    def compute(self, expert: ExpertId, slot: int) -> None:
        """Launch one resident expert on the device; do not wait for it."""
        ...

    def used(self, layer: int, demands: Iterable[int], token: float) -> None:
        """Hear which experts a layer needs, wherever they are."""
        ...

    def in_ram(self, expert: ExpertId) -> bool:
        """Say whether RAM holds an expert now, so that no read of the disk is needed."""
        ...

    def fetch(self, experts: Sequence[ExpertId]) -> tuple[Sequence[ExpertId], bool]:
        """Let the CPU have as many of `experts` as RAM holds, at least one; say whether that had
        to be waited for. All that are missing are read meanwhile."""
        ...

    def let_go(self, experts: Sequence[ExpertId]) -> None:
        """Give back what was fetched."""
        ...

    def compute_on_cpu(self, experts: Sequence[ExpertId]) -> None:
        """Compute these experts, which were fetched, on the CPU, all in one call."""
        ...

    def ended(self, wait: bool) -> Sequence[TransferEnded]:
        """Return the transfers that ended since the last call; with `wait`, at least one."""
        ...


def begin_pass(
    residency: Residency,
    ports: LayerPorts,
    tokens: int,
    span: int,
    predictions: Sequence[Prediction],
) -> None:
    """Start a forward pass: note what landed, copy ahead what its tokens already tell."""
    _take_ended(residency, ports)
    residency.prompt = span > 1
    residency.policy.note_link(*ports.link_totals())
    moment = _moment(residency, ports, tokens)
    _do(residency, ports, residency.begin_pass(span, predictions, moment))


def run_layer(
    residency: Residency, ports: LayerPorts, layer: int, tokens: int, step: LayerStep
) -> None:
    """Serve one layer: hits first, CPU work while copies fly, loads as they land."""
    _take_ended(residency, ports)
    ports.used(layer, step.demands, residency.token)
    steps = residency.routed(layer, step, _moment(residency, ports, tokens))
    _do(residency, ports, Steps(steps.orders, steps.compute))
    _do(residency, ports, residency.ahead())
    if steps.cpu:
        _compute_on_cpu(residency, ports, steps.cpu)
    while residency.waits:
        began_s, done_s = ports.now_s(), ports.watch_compute()
        events = ports.ended(wait=True)
        idle_from_s = max(began_s, done_s())
        residency.stalled(
            max(0.0, ports.now_s() - idle_from_s),
            max((event.bytes_s for event in events), default=0.0) - idle_from_s,
        )
        for event in events:
            _do(residency, ports, residency.ended(event))
    _do(residency, ports, residency.layer_done(_moment(residency, ports, tokens)))


def _take_ended(residency: Residency, ports: LayerPorts) -> None:
    for event in ports.ended(wait=False):
        _do(residency, ports, residency.ended(event))


def _moment(residency: Residency, ports: LayerPorts, tokens: int) -> Moment:
    return Moment(
        residency.token,
        tokens,
        residency.prompt,
        ports.now_s(),
        ports.busy_until_s(),
        ports.queue_state(),
        residency.cache.free_slots,
        residency.cache.here,
        residency.cache.held,
        ports.in_ram,
    )


def _do(residency: Residency, ports: LayerPorts, steps: Steps) -> None:
    if steps.orders:
        ports.order(steps.orders)
    launched: list[ExpertId] = []
    for expert, slot in steps.compute:
        ports.compute(expert, slot)
        launched.append(expert)
        if residency.needs_slot:
            _do(residency, ports, residency.computed(launched))
            launched = []
    if launched:
        _do(residency, ports, residency.computed(launched))
    if steps.cpu:
        _compute_on_cpu(residency, ports, steps.cpu)


def _compute_on_cpu(residency: Residency, ports: LayerPorts, experts: Sequence[ExpertId]) -> None:
    """Compute what RAM holds at once, all in one call, and the rest as the disk brings it."""
    left, seconds = list(experts), 0.0
    while left:
        idle_from_s = max(ports.now_s(), ports.busy_until_s())
        held, waited = ports.fetch(left)
        began_s = ports.now_s()
        if waited:
            stall_s = max(0.0, began_s - idle_from_s)
            residency.stalled(stall_s, stall_s)
        ports.compute_on_cpu(held)
        seconds += ports.now_s() - began_s
        ports.let_go(held)
        left = [expert for expert in left if expert not in held]
    residency.policy.note_cpu(seconds)
