"""Carries out one MoE layer after another: routing in, rows out, copies beside the computing.

Every path (resident, loaded, CPU) writes its own (token, k) row, and one canonical combine adds a
token's rows in ascending expert order. So a plan changes when and where an expert is computed,
never the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch

from runtime.cache import CacheTable, SlotState
from runtime.core import POLICIES, ExpertId, HardwareProfile, PolicyName
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.formats import ExpertFormat
from runtime.kernels import ExpertMath, views
from runtime.layer_rows import LayerRows, open_rows
from runtime.layer_run import run_layer
from runtime.link import Link, chunk_bytes_for
from runtime.residency import Residency
from runtime.scheduler import Costs
from runtime.store import ExpertStore
from runtime.telemetry import Counters
from runtime.transfer import Transfer, TransferThread, virtual_transfer
from runtime.transfer_queue import Order, Outcome, Submit, TransferEnded

HEAT_MAX = 127
RESIDENT_BIT = 0x80


class MoeLayer(Protocol):
    """What the executor needs to know of a MoE layer."""

    @property
    def experts(self) -> int: ...

    @property
    def math(self) -> ExpertMath: ...

    @property
    def format(self) -> ExpertFormat: ...


class Executor:
    """Owns slots, residency and transfers of one loaded model. The engine thread calls it.

    `counters`, `heat` and the properties may be read from any thread; what they show then may be
    a layer old.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[MoeLayer],
        store: ExpertStore,
        profile: HardwareProfile,
        slots: int,
        policy: PolicyName,
        *,
        virtual_clock: bool = False,
        observe: Callable[[int, Mapping[int, int]], None] | None = None,
    ) -> None:
        self._device = device
        self._layers = tuple(layers)
        self._store = store
        self._observe = observe
        self._slot_bytes = max(layer.format.size_bytes for layer in layers)
        self._slab = device.allocate_slots(slots, self._slot_bytes)
        self._slot_views: dict[tuple[int, ExpertFormat], dict[str, torch.Tensor]] = {}
        self._host_views: dict[ExpertId, dict[str, torch.Tensor]] = {}
        self._counters = Counters()
        self.residency = Residency(
            CacheTable(slots),
            policy,
            Costs.of(profile),
            [layer.format.size_bytes for layer in layers],
            self._counters,
        )
        chunk_bytes = chunk_bytes_for(profile.link_bytes_per_s.value)
        self._link = Link(device, self._slab, store.bytes_of, chunk_bytes)
        drive = virtual_transfer if virtual_clock else TransferThread
        self._transfer: Transfer = drive(device, self._link, chunk_bytes)
        self._closing = ExitStack()
        self._closing.callback(device.close)
        self._closing.callback(self._transfer.close)
        self._rows: LayerRows | None = None

    @property
    def policy(self) -> PolicyName:
        return self.residency.policy

    @property
    def slots(self) -> int:
        return self.residency.cache.capacity

    @property
    def slots_used(self) -> int:
        return self.residency.cache.used

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def set_policy(self, policy: str) -> None:
        """Serve misses as `policy` says from the next layer on.

        Raises:
            ConfigError: there is no such policy, or it needs slots and there are none.
        """
        known = next((name for name in POLICIES if name == policy), None)
        if known is None:
            raise ConfigError(
                f"There is no policy called {policy!r}.", f"Choose one of {', '.join(POLICIES)}."
            )
        if self.slots == 0 and known != "cpu-only":
            raise ConfigError(
                f"The policy {known!r} needs expert slots and this machine has none.",
                "Without a card experts are computed in place: choose cpu-only.",
            )
        self.residency.policy = known

    def computing(self) -> AbstractContextManager[object]:
        """Return the context that a forward pass must run in."""
        return self._device.computing()

    def begin_pass(self, tokens: int) -> None:
        """Note that a forward pass of `tokens` rows starts.

        The caller has waited for the compute stream since the pass before: it needed the logits.
        """
        self.residency.begin_pass()

    def counters(self) -> Counters:
        """Return a copy of the counters in which the bytes over the link close."""
        counters = self._counters.copy()
        counters.link_bytes_issued = self._transfer.issued_bytes
        unused = (self.residency.cache.slot(n) for n in range(self._slab.shape[0]))
        waiting = sum(s.unused_prefetch_bytes for s in unused if s.state is SlotState.READY)
        counters.link_bytes_pending = self._transfer.pending_bytes + waiting
        counters.link_busy_s = self._transfer.busy_s
        return counters

    def heat(self) -> bytes:
        """Return one byte per (layer, expert): bit 7 in a slot, the rest how hot, 0 to 127."""
        history, now_pass = self.residency.history, self._counters.forward_passes
        width = max(layer.experts for layer in self._layers)
        picture = bytearray(len(self._layers) * width)
        for number, layer in enumerate(self._layers):
            for expert in range(layer.experts):
                score = history.score(ExpertId(number, expert), now_pass)
                picture[number * width + expert] = min(HEAT_MAX, int(score * 24))
        for layer_number, expert in self.residency.cache.experts():
            picture[layer_number * width + expert] |= RESIDENT_BIT
        return bytes(picture)

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute one MoE layer's routed experts.

        Args:
            layer: index of the MoE layer.
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden): what transformers' `eager` experts return, bit for bit on the same
            device, dtype, chunking and batch.
        """
        rows = open_rows(self._layers[layer].math, hidden_states, top_k_index, top_k_weights)
        if self._observe is not None:
            self._observe(layer, rows.demands)
        self._device.begin_layer(hidden_states.shape[0])
        self._rows = rows
        finished = False
        try:
            run_layer(self.residency, self, layer, rows.demands)
            finished = True
        finally:
            self._rows = None
            if not finished:
                self.residency.abandon_layer()
        return rows.combined()

    def resize(self, slots: int) -> None:
        """Use only `slots` of the allocated slots; called between two layers."""
        self.order(self.residency.resize(slots).orders)

    def close(self) -> None:
        """End the transfer thread and give the device back; safe to call twice."""
        self._closing.close()

    # What `run_layer` asks for (`LayerPorts`).

    def now_s(self) -> float:
        return self._device.now_s()

    def busy_until_s(self) -> float:
        return self._device.busy_until_s()

    def backlog_bytes(self) -> int:
        return self._transfer.backlog_bytes

    def order(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Submit):
                self._link.free(order.slot)
        self._transfer.order(orders, self._device.now_s())

    def compute(self, expert: ExpertId, slot: int) -> None:
        rows, layout = self._rows, self._layers[expert.layer].format
        assert rows is not None
        parts = self._views_of(slot, layout)
        tokens = rows.demands[expert.expert]
        self._device.launch(
            slot, layout.size_bytes, tokens, lambda: rows.compute(expert.expert, parts)
        )

    def compute_on_cpu(self, experts: Sequence[ExpertId]) -> None:
        rows = self._rows
        assert rows is not None

        def compute() -> None:
            for expert in experts:
                rows.compute(expert.expert, self._host_views_of(expert))

        layout_bytes = self._layers[experts[0].layer].format.size_bytes
        work = [(layout_bytes, rows.demands[expert.expert]) for expert in experts]
        backlog_bytes = self._transfer.backlog_bytes
        self._counters.cpu_expert_s += self._device.on_cpu(work, backlog_bytes, compute)

    def ended(self, wait: bool) -> Sequence[TransferEnded]:
        events = self._transfer.ended(self._device.now_s(), wait)
        for event in events:
            if event.outcome is Outcome.LANDED:
                self._link.take_done(event.slot)
        if events:
            self._device.reached(events[-1].at_s)
        return events

    def _host_views_of(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        known = self._host_views.get(expert)
        if known is None:
            known = views(self._store.bytes_of(expert), self._layers[expert.layer].format)
            self._host_views[expert] = known
        return known

    def _views_of(self, slot: int, layout: ExpertFormat) -> dict[str, torch.Tensor]:
        key = (slot, layout)
        known = self._slot_views.get(key)
        if known is None:
            known = views(self._slab[slot, : layout.size_bytes], layout)
            self._slot_views[key] = known
        return known
