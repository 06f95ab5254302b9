"""Carries out one MoE layer after another: routing in, rows out, copies beside the computing.

Every path (resident, loaded, CPU) writes its own (token, k) row, and one canonical combine adds a
token's rows in ascending expert order. So a plan changes when and where an expert is computed,
never the result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch

from runtime.cache import CacheTable
from runtime.core import ExpertId, HardwareProfile, Verdict
from runtime.device import Device
from runtime.disk import Disk
from runtime.executor_heat import Heat
from runtime.executor_preload import preload
from runtime.executor_ram import RamExperts
from runtime.executor_slots import SlotBlocks
from runtime.executor_steering import Steering, serving_policy
from runtime.formats import ExpertFormat
from runtime.hot_experts import HotExperts
from runtime.kernels import ExpertMath, views
from runtime.kernels_crossover import assumed_few_tokens
from runtime.layer_rows import LayerRows, RoutedTokens, open_rows, recency_of
from runtime.layer_run import begin_pass, run_layer
from runtime.link import Link, chunk_bytes_for
from runtime.policy import PolicySetup
from runtime.policy_table import BY_LAYER
from runtime.prediction import ExpertPredictor
from runtime.residency import Residency
from runtime.scheduler import Costs
from runtime.store import ExpertStore
from runtime.telemetry import Counters
from runtime.trace import LayerStep, Prediction
from runtime.transfer import Transfer, TransferThread, virtual_transfer
from runtime.transfer_queue import Order, Outcome, QueueState, Submit, TransferEnded

log = logging.getLogger("prescope.executor")


class MoeLayer(Protocol):
    """What the executor needs to know of a MoE layer."""

    @property
    def experts(self) -> int: ...

    @property
    def math(self) -> ExpertMath: ...

    @property
    def top_k(self) -> int: ...

    @property
    def format(self) -> ExpertFormat: ...


BEFORE_LAYERS = -1
Observe = Callable[[int, LayerStep], None]
"""Told of every layer; and of `BEFORE_LAYERS` with the guesses that a pass begins with."""


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
        policy: str,
        *,
        virtual_clock: bool = False,
        predictor: ExpertPredictor | None = None,
        eviction: str | None = None,
        observe: Observe | None = None,
        hot: HotExperts | None = None,
        few_tokens: Callable[[ExpertFormat], int] = assumed_few_tokens,
    ) -> None:
        self._device = device
        self._layers = tuple(layers)
        self._maths = tuple(
            layer.math.reading(layer.format, few_tokens(layer.format)) for layer in layers
        )
        self._store = store
        self._observe = observe
        self._predictor = predictor
        self._hot = hot
        self._slot_bytes = max(layer.format.size_bytes for layer in layers)
        self._slab = SlotBlocks(device, slots, self._slot_bytes)
        self._slot_views: dict[tuple[int, ExpertFormat], dict[str, torch.Tensor]] = {}
        self._ram = RamExperts(store, [layer.format for layer in layers])
        self._counters = Counters()
        setup = PolicySetup(
            tuple(layer.experts for layer in layers),
            max(layer.top_k for layer in layers),
            tuple(layer.format.size_bytes for layer in layers),
            slots,
            Costs.of(profile),
        )
        self._least_slots = min(setup.top_k, slots)
        chosen = serving_policy(policy, setup, eviction)
        cache = CacheTable(slots, chosen.eviction)
        self._layer_bytes = setup.layer_bytes
        self.residency = Residency(cache, chosen, setup.layer_bytes, self._counters)
        self._steering = Steering(self.residency, setup, eviction)
        self._heat = Heat(setup.experts)
        chunk_bytes = chunk_bytes_for(profile.link_bytes_per_s.value)
        self._link = Link(device, self._slab, store.bytes_of, chunk_bytes)
        drive = virtual_transfer if virtual_clock else TransferThread
        store.tier.begin()
        disk = Disk(store.tier, store.fill)
        self._transfer: Transfer = drive(device, self._link, chunk_bytes, disk)
        self._closing = ExitStack()
        self._closing.callback(device.close)
        self._closing.callback(self._transfer.close)
        self._closing.callback(self._keep_hot, at_once=True)
        self._rows: Sequence[LayerRows] = ()
        self._demands: Mapping[int, int] = {}
        self._span = 1
        self._cpu_likely = self._cpu_used = False
        self._uncounted = (0, 0.0)

    @property
    def policy(self) -> str:
        return self.residency.policy.name

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
        self.order(self._steering.follow(policy))

    @property
    def look_ahead(self) -> bool:
        """Whether experts are copied ahead now."""
        return self._steering.looks_ahead

    @property
    def verdict(self) -> Verdict | None:
        """What was measured of copying ahead; None where nothing is copied ahead."""
        return self._steering.verdict

    @property
    def stall_s_by_layer(self) -> tuple[float, ...]:
        """Seconds that each layer waited for the link since the start."""
        return tuple(self.residency.stall_s_by_layer)

    def set_prediction(self, on: bool) -> None:
        """Let experts be copied ahead, or not, from the next layer on."""
        self.order(self._steering.predict(on))

    def preload(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Fill free slots with the experts used most, before the first token and its counting.

        Raises:
            CancelledError: `cancelled` returned True.
        """
        if self._hot is None:
            return
        by_layer = self.policy in BY_LAYER
        experts = self._hot.first(self.residency.cache.free_slots, by_layer=by_layer)
        preload(self, self.residency.cache, experts, self._layer_bytes, cancelled)
        self._uncounted = self.link_totals()
        self._store.tier.count_anew()

    def idle(self, budget_s: float) -> None:
        """Let the predictor learn for up to `budget_s`, while nothing is generated."""
        self._keep_hot(at_once=False)
        if self._predictor is None:
            return
        try:
            with self.computing():  # what is made there is multiplied on that stream
                self._predictor.improve(budget_s)
        except RuntimeError as failure:  # no memory left on a full card, or no convergence
            log.warning("learning was given up for now: %s", failure)

    def reset_predictor(self) -> None:
        """Forget what was learned on this machine."""
        if self._hot is not None:
            self._hot.reset()
        if self._predictor is not None:
            with self.computing():
                self._predictor.reset()

    def computing(self) -> AbstractContextManager[object]:
        """Return the context that a forward pass must run in."""
        return self._device.computing()

    def begin_pass(self, tokens: int, token_ids: Sequence[int] = (), span: int = 1) -> None:
        """Note that a forward pass of `tokens` rows starts, `span` of them one after another.

        `token_ids` are those of all rows, if known. The caller has waited for the compute stream
        since the pass before: it needed the logits.
        """
        self._steering.begin_pass(self._device.now_s(), tokens, span > 1)
        predictions: tuple[Prediction, ...] = ()
        if self._predictor is not None and self._steering.guesses and len(token_ids):
            began_s = time.perf_counter()
            ids = torch.tensor(token_ids, device=self._device.torch_device)
            predictions = self._predictor.begin_pass(ids).read()
            self._counters.predictor_s += time.perf_counter() - began_s
        if self._observe is not None:
            self._observe(BEFORE_LAYERS, LayerStep({}, predictions))
        self._span = span
        self._cpu_likely, self._cpu_used = self._cpu_used, False
        begin_pass(self.residency, self, tokens, span, predictions)

    def counters(self) -> Counters:
        """Return a copy of the counters in which the bytes over the link close."""
        counters = self._counters.copy()
        uncounted_bytes, uncounted_s = self._uncounted
        counters.link_bytes_issued = self._transfer.issued_bytes - uncounted_bytes
        unused_bytes = self.residency.cache.unused_prefetch_bytes
        counters.link_bytes_pending = self._transfer.pending_bytes + unused_bytes
        counters.link_busy_s = self._transfer.busy_s - uncounted_s
        self._store.tier.counted(counters)
        return counters

    def heat(self) -> bytes:
        """Return one byte per (layer, expert): bit 7 in a slot, the rest how hot, 0 to 127."""
        return self._heat.picture(self.residency.cache.experts(), self.residency.token)

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
        part = RoutedTokens(hidden_states, top_k_index, top_k_weights)
        return self.run_together(layer, [part])[0]

    def run_together(self, layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
        """Compute one MoE layer for several sequences that meet there.

        Their demands are united, so a missing expert moves once for all; each sequence's rows are
        computed and added up on their own, so it gets bit for bit what it would get alone.
        """
        tokens = sum(part.hidden_states.shape[0] for part in parts)
        predictor = self._predictor if self._steering.guesses else None
        began_s = time.perf_counter()
        pending = None if predictor is None else predictor.launch(layer, *_joined(parts))
        launched_s = time.perf_counter()
        flat = None if pending is None else pending.flat
        also = () if flat is None else (flat,)
        math = self._maths[layer]
        rows, read = open_rows(math, self._device, parts, also, self._cpu_likely)
        opened_s = time.perf_counter()
        step = LayerStep(
            _united(rows),
            () if pending is None else pending.read(*read),
            recency_of([mine.last_chosen for mine in rows]) if self._span > 1 else None,
        )
        if predictor is not None:
            self._counters.predictor_s += time.perf_counter() - opened_s + launched_s - began_s
        self._heat.use(layer, step.chosen, self.residency.token)
        if self._hot is not None:
            self._hot.use(layer, step.chosen)
        if self._observe is not None:
            self._observe(layer, step)
        read_bytes = 0 if predictor is None else predictor.weight_bytes
        self._device.begin_layer(tokens, read_bytes, len(parts))
        self._rows, self._demands = rows, step.demands
        finished = False
        try:
            run_layer(self.residency, self, layer, tokens, step)
            finished = True
        finally:
            self._rows, self._demands = (), {}
            if not finished:
                self._transfer.abandon()
                self.order(self.residency.abandon_layer().orders)
        return [mine.combined() for mine in rows]

    def resize(self, slots: int) -> None:
        """Use only `slots` of the allocated slots; called between two layers."""
        self.order(self.residency.resize(min(slots, self._slab.slots)).orders)

    def shrink(self) -> bool:
        """Give a quarter of the slots and their memory back for good; called between two passes.

        False if no layer could do with fewer.
        """
        self._device.wait_for_compute()  # nothing may still read what is given back
        cache = self.residency.cache
        wanted = max(cache.capacity * 3 // 4, self._least_slots)
        if wanted >= cache.capacity:
            return False
        self.resize(wanted)
        places = (cache.find(expert) for expert in cache.experts())
        used = 1 + max((place for place in places if place is not None), default=-1)
        kept = self._slab.keep(max(wanted, used))
        for slot, layout in [key for key in self._slot_views if key[0] >= kept]:
            del self._slot_views[slot, layout]
        return True

    def resize_ram(self, experts: int) -> int:
        """Let RAM hold so many experts; called between two layers. Return how many it may hold:
        as they were where every expert has a place of its own size."""
        return self._ram.resize(experts, self._transfer)

    @property
    def ram_experts(self) -> int:
        """How many experts RAM may hold now."""
        return self._ram.held

    def close(self) -> None:
        """End the transfer thread and give the device back; safe to call twice."""
        self._closing.close()

    # What `run_layer` asks for (`LayerPorts`).

    def now_s(self) -> float:
        return self._device.now_s()

    def busy_until_s(self) -> float:
        return self._device.busy_until_s()

    def watch_compute(self) -> Callable[[], float]:
        return self._device.watch_compute()

    def queue_state(self) -> QueueState:
        return self._transfer.state(self._device.now_s())

    def link_totals(self) -> tuple[int, float]:
        return self._transfer.issued_bytes, self._transfer.busy_s

    def order(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Submit):
                self._link.free(order.slot)
        self._transfer.order(orders, self._device.now_s())

    def compute(self, expert: ExpertId, slot: int) -> None:
        layout = self._layers[expert.layer].format
        parts = self._views_of(slot, layout)
        rows, number = self._rows, expert.expert

        def compute() -> None:
            for mine in rows:
                if number in mine.demands:
                    mine.compute(number, parts)

        self._device.launch(slot, layout.size_bytes, self._demands[number], compute)

    def compute_on_cpu(self, experts: Sequence[ExpertId]) -> None:
        rows, self._cpu_used = self._rows, True

        def compute() -> None:
            parts = {expert.expert: self._ram.views_of(expert) for expert in experts}
            for mine in rows:
                demanded = {e: held for e, held in parts.items() if e in mine.demands}
                if demanded:
                    mine.compute_on_cpu(demanded)

        layout_bytes = self._layers[experts[0].layer].format.size_bytes
        work = [(layout_bytes, self._demands[expert.expert]) for expert in experts]
        backlog_bytes = self._transfer.backlog_bytes
        self._counters.cpu_expert_s += self._device.on_cpu(work, backlog_bytes, compute)

    def used(self, layer: int, demands: Iterable[int], token: float) -> None:
        self._transfer.used(layer, demands, token)

    def in_ram(self, expert: ExpertId) -> bool:
        return self._store.tier.place_of(expert) is not None

    def fetch(self, experts: Sequence[ExpertId]) -> tuple[Sequence[ExpertId], bool]:
        asked_s = self._device.now_s()
        held, at_s = self._transfer.fetch(experts, asked_s)
        if at_s > asked_s:
            self._device.reached(at_s)
        return held, at_s > asked_s

    def let_go(self, experts: Sequence[ExpertId]) -> None:
        self._transfer.let_go(experts, self._device.now_s())

    def ended(self, wait: bool) -> Sequence[TransferEnded]:
        events = self._transfer.ended(self._device.now_s(), wait)
        for event in events:
            if event.outcome is Outcome.LANDED:
                self._link.take_done(event.slot)
        if events:
            self._device.reached(events[-1].at_s)
        return events

    def _keep_hot(self, at_once: bool) -> None:
        if self._hot is not None:
            self._hot.save(at_once=at_once)
            for notice in self._hot.notices:
                log.warning("%s", notice)
            self._hot.notices = ()

    def _views_of(self, slot: int, layout: ExpertFormat) -> dict[str, torch.Tensor]:
        key = (slot, layout)
        known = self._slot_views.get(key)
        if known is None:
            known = views(self._slab[slot, : layout.size_bytes], layout)
            self._slot_views[key] = known
        return known


def _united(rows: Sequence[LayerRows]) -> Mapping[int, int]:
    """Return each expert that anybody demands, ascending, and its tokens in all."""
    if len(rows) == 1:
        return rows[0].demands
    tokens: dict[int, int] = {}
    for mine in rows:
        for expert, count in mine.demands.items():
            tokens[expert] = tokens.get(expert, 0) + count
    return dict(sorted(tokens.items()))


def _joined(parts: Sequence[RoutedTokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(parts) == 1:
        return parts[0].hidden_states, parts[0].top_k_index, parts[0].top_k_weights
    return (
        torch.cat([part.hidden_states for part in parts]),
        torch.cat([part.top_k_index for part in parts]),
        torch.cat([part.top_k_weights for part in parts]),
    )
