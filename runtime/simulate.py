"""The simulator: a routing trace through the engine's own residency, queue and ledger.

No weights and no threads. On the trace of an engine run under a virtual clock it counts exactly
what the engine counted, which is the test that it tells the truth about the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.cache import CacheTable
from runtime.core import ExpertId, HardwareProfile, PolicyName
from runtime.layer_run import run_layer
from runtime.residency import Residency
from runtime.scheduler import Costs
from runtime.telemetry import Counters
from runtime.timeline import Timeline
from runtime.transfer_pump import TransferPump
from runtime.transfer_queue import Chunk, Order, Outcome, Submit, TransferEnded, TransferQueue


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass of a trace: its tokens, and expert -> tokens for every MoE layer."""

    tokens: int
    layers: tuple[Mapping[int, int], ...]


@dataclass(frozen=True)
class Simulated:
    """What a simulated run counted and how long the modelled machine took, in seconds."""

    counters: Counters
    total_s: float


def simulate(
    trace: Sequence[ForwardPass],
    profile: HardwareProfile,
    policy: PolicyName,
    slots: int,
    layer_bytes: Sequence[int],
    chunk_bytes: int,
) -> Simulated:
    """Run `trace` on the modelled machine of `profile` from a cold cache."""
    counters = Counters()
    residency = Residency(CacheTable(slots), policy, Costs.of(profile), layer_bytes, counters)
    ports = _LedgerPorts(profile, layer_bytes, chunk_bytes, counters)
    for forward in trace:
        ports.timeline.wait_for_compute()
        residency.begin_pass()
        for layer, demands in enumerate(forward.layers):
            ports.open_layer(forward.tokens, demands)
            run_layer(residency, ports, layer, demands)
    ports.timeline.wait_for_compute()
    counters.link_bytes_issued = ports.pump.issued_bytes
    counters.link_bytes_pending = ports.pump.pending_bytes
    counters.link_busy_s = ports.pump.busy_s
    return Simulated(counters, ports.timeline.host_s)


class _LedgerPorts:
    """`LayerPorts` that charge work to a timeline and do nothing else."""

    def __init__(
        self,
        profile: HardwareProfile,
        layer_bytes: Sequence[int],
        chunk_bytes: int,
        counters: Counters,
    ) -> None:
        self.timeline = Timeline(profile)
        self.pump = TransferPump(TransferQueue(chunk_bytes), self._copy)
        self._layer_bytes = tuple(layer_bytes)
        self._counters = counters
        self._demands: Mapping[int, int] = {}
        self._free_s: dict[int, float] = {}

    def open_layer(self, tokens: int, demands: Mapping[int, int]) -> None:
        self.timeline.layer(tokens)
        self._demands = demands

    def now_s(self) -> float:
        return self.timeline.host_s

    def busy_until_s(self) -> float:
        return self.timeline.compute_free_s

    def backlog_bytes(self) -> int:
        return self.pump.backlog_bytes

    def order(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Submit):
                self._free_s[order.slot] = self.timeline.compute_free_s
        self.pump.order(orders, self.timeline.host_s)

    def compute(self, expert: ExpertId, slot: int) -> None:
        size = self._layer_bytes[expert.layer]
        tokens = self._demands[expert.expert]
        self.timeline.device_expert(size, tokens)

    def compute_on_cpu(self, experts: Sequence[ExpertId]) -> None:
        work = [(self._layer_bytes[e.layer], self._demands[e.expert]) for e in experts]
        copying_until_s = self.timeline.copying_until_s(self.pump.backlog_bytes)
        self._counters.cpu_expert_s += self.timeline.cpu_experts(work, copying_until_s)

    def ended(self, wait: bool) -> Sequence[TransferEnded]:
        events = self.pump.ended(self.timeline.host_s, wait)
        for event in events:
            if event.outcome is Outcome.LANDED:
                self.timeline.compute_waits(event.at_s)
        if events:
            self.timeline.host_s = max(self.timeline.host_s, events[-1].at_s)
        return events

    def _copy(self, chunk: Chunk) -> tuple[float, float]:
        if chunk.first:
            self.timeline.copy_waits(self._free_s.pop(chunk.slot))
        return self.timeline.copy(chunk.size_bytes, chunk.ready_s, chunk.first)
