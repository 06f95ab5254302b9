"""The simulator: a routing trace through the engine's own residency, queue and ledger.

No weights and no threads. On the trace of an engine run under a virtual clock it counts exactly
what the engine counted, which is the test that it tells the truth about the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from runtime.cache import CacheTable
from runtime.controller import Controller
from runtime.core import ExpertId, HardwareProfile
from runtime.errors import PreScopeError
from runtime.layer_run import begin_pass, run_layer
from runtime.policy import Policy
from runtime.ram_tier import RamTier, Read
from runtime.residency import Residency
from runtime.simulate_deciding import Deciding, PacedResidency
from runtime.telemetry import Counters
from runtime.timeline import Timeline
from runtime.trace import ForwardPass, LayerStep
from runtime.transfer_pump import TransferPump
from runtime.transfer_queue import (
    Chunk,
    Order,
    Outcome,
    QueueState,
    Submit,
    TransferEnded,
    TransferQueue,
)


@dataclass(frozen=True)
class Simulated:
    """What a simulated run counted and how long the modelled machine took, in seconds.

    `warm` and `warm_s` are the counters and the time when the warm-up passes were over.
    """

    counters: Counters
    total_s: float
    warm: Counters
    warm_s: float
    stall_s_by_layer: tuple[float, ...]

    @property
    def measured(self) -> Counters:
        """What was counted after the warm-up."""
        return self.counters.since(self.warm)

    @property
    def measured_s(self) -> float:
        return self.total_s - self.warm_s


def simulate(
    passes: Sequence[ForwardPass],
    profile: HardwareProfile,
    policy: Policy,
    slots: int,
    layer_bytes: Sequence[int],
    chunk_bytes: int,
    *,
    predictor_bytes: int = 0,
    warm_passes: int = 0,
    controller: Controller | None = None,
    preload: Sequence[ExpertId] = (),
    ram: RamTier | None = None,
    deciding: Deciding | None = None,
    watch: Callable[[Residency], None] = lambda residency: None,
) -> Simulated:
    """Run a trace's passes on the modelled machine of `profile`.

    The cache starts cold but for `preload`, at most as many experts as there are slots, which are
    there before time begins. `predictor_bytes` are the weights that a predictor reads per layer;
    they are charged to the device where the policy predicts. A `controller` decides how far is
    copied ahead; without one the policy's own choice stands. `ram` holds some of the experts and
    is changed by the run; without it RAM holds them all. `deciding` is charged to the host on top
    of the profile's `host_layer_s`. `watch` is given the residency before the first pass, to see
    its calls.
    """
    counters = Counters()
    charged_bytes = predictor_bytes if policy.predicts else 0
    ports = _LedgerPorts(profile, layer_bytes, chunk_bytes, counters, charged_bytes, ram)
    owned = (CacheTable(slots, policy.eviction), policy, layer_bytes, counters)
    if deciding is None:
        residency = Residency(*owned)
    else:
        residency = PacedResidency(*owned, ports.timeline, deciding)
    watch(residency)
    for expert in preload:
        number, _ = residency.cache.reserve(expert, None, 0.0, prefetched=False)
        residency.cache.landed(number)
        if ram is not None:
            ram.arrived(expert, number)
    warm, warm_s = Counters(), 0.0
    for number, forward in enumerate(passes):
        ports.timeline.wait_for_compute()
        if number == warm_passes:
            warm = ports.counted(residency.cache.unused_prefetch_bytes)
            warm_s = ports.timeline.host_s
        if controller is not None and policy.copies_ahead:
            now_s, prompt = ports.timeline.host_s, forward.span > 1
            policy.look_ahead = controller.begin_pass(now_s, forward.tokens, prompt)
        begin_pass(residency, ports, forward.tokens, forward.span, forward.predictions)
        for layer, step in enumerate(forward.layers):
            ports.open_layer(forward, step)
            run_layer(residency, ports, layer, forward.tokens, step)
    ports.timeline.wait_for_compute()
    stalls = tuple(residency.stall_s_by_layer)
    counted = ports.counted(residency.cache.unused_prefetch_bytes)
    return Simulated(counted, ports.timeline.host_s, warm, warm_s, stalls)


class _LedgerPorts:
    """`LayerPorts` that charge work to a timeline and do nothing else."""

    def __init__(
        self,
        profile: HardwareProfile,
        layer_bytes: Sequence[int],
        chunk_bytes: int,
        counters: Counters,
        predictor_bytes: int,
        ram: RamTier | None,
    ) -> None:
        self.timeline = Timeline(profile)
        self.pump = TransferPump(TransferQueue(chunk_bytes), self._copy, ram, self._read)
        self._ram = ram
        self._layer_bytes = tuple(layer_bytes)
        self._counters = counters
        self._predictor_bytes = predictor_bytes
        self._step = LayerStep({})
        self._free_s: dict[int, float] = {}

    def open_layer(self, forward: ForwardPass, step: LayerStep) -> None:
        self.timeline.layer(forward.tokens, self._predictor_bytes, forward.forwards)
        self._step = step

    def counted(self, unused_bytes: int) -> Counters:
        """Return the counters with what the link knows; `unused_bytes` wait for their first use."""
        counters = self._counters.copy()
        counters.link_bytes_issued = self.pump.issued_bytes
        counters.link_bytes_pending = self.pump.pending_bytes + unused_bytes
        counters.link_busy_s = self.pump.busy_s
        if self._ram is not None:
            self._ram.counted(counters)
        return counters

    def now_s(self) -> float:
        return self.timeline.host_s

    def busy_until_s(self) -> float:
        return self.timeline.compute_free_s

    def watch_compute(self) -> Callable[[], float]:
        done_s = self.timeline.compute_free_s
        return lambda: done_s

    def queue_state(self) -> QueueState:
        return self.pump.state(self.timeline.host_s)

    def link_totals(self) -> tuple[int, float]:
        return self.pump.issued_bytes, self.pump.busy_s

    def order(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Submit):
                self._free_s[order.slot] = self.timeline.compute_free_s
        self.pump.order(orders, self.timeline.host_s)

    def compute(self, expert: ExpertId, slot: int) -> None:
        size = self._layer_bytes[expert.layer]
        self.timeline.device_expert(size, self._step.demands[expert.expert])

    def compute_on_cpu(self, experts: Sequence[ExpertId]) -> None:
        demands = self._step.demands
        work = [(self._layer_bytes[e.layer], demands[e.expert]) for e in experts]
        copying_until_s = self.timeline.copying_until_s(self.pump.backlog_bytes)
        self._counters.cpu_expert_s += self.timeline.cpu_experts(work, copying_until_s)

    def used(self, layer: int, demands: Iterable[int], token: float) -> None:
        self.pump.used(layer, demands, token)

    def in_ram(self, expert: ExpertId) -> bool:
        return self._ram is None or self._ram.place_of(expert) is not None

    def fetch(self, experts: Sequence[ExpertId]) -> tuple[Sequence[ExpertId], bool]:
        asked_s = self.timeline.host_s
        held, at_s = self.pump.fetch(experts, asked_s)
        self.timeline.host_s = max(asked_s, at_s)
        return held, at_s > asked_s

    def let_go(self, experts: Sequence[ExpertId]) -> None:
        self.pump.let_go(experts, self.timeline.host_s)

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

    def _read(self, read: Read) -> tuple[float, PreScopeError | None]:
        return self.timeline.disk(read.size_bytes, read.ordered_s), None
