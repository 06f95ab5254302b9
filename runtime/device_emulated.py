"""An emulated card: moves the real bytes, really computes, and charges a ledger for it.

It also checks happens-before on every access to a slot or staging buffer, so that a missing fence
fails a test on a machine without a GPU. Only fences count: that a thread happened to wait proves
nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from runtime.core import HardwareProfile
from runtime.device import Fence, Stream
from runtime.device_host_memory import host_memory
from runtime.timeline import Timeline

HOST = "host"
ENGINE = "engine"
LAG_TOLERANCE_S = 0.004


class HazardError(AssertionError):
    """Two accesses to the same bytes that no fence orders: a bug of ours, never the user's."""


@dataclass(frozen=True)
class EmulatedFence:
    """When the ledger says it is reached, and what is known to have happened by then."""

    at_s: float
    known: dict[str, int]


@dataclass
class _Region:
    """The last write and the reads since then, as (stream, step) stamps."""

    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict)


class HappensBefore:
    """Vector clocks over the two streams and the host's two threads: the transfer driver's, which
    stages, and the engine's."""

    def __init__(self) -> None:
        names = (HOST, ENGINE, Stream.COPY.value, Stream.COMPUTE.value)
        self._known: dict[str, dict[str, int]] = {name: {} for name in names}
        self._regions: dict[str, _Region] = {}

    def known(self, stream: str) -> dict[str, int]:
        return dict(self._known[stream])

    def learn(self, stream: str, known: dict[str, int]) -> None:
        mine = self._known[stream]
        for other, step in known.items():
            mine[other] = max(mine.get(other, 0), step)

    def read(self, stream: str, name: str) -> None:
        region = self._regions.setdefault(name, _Region())
        self._require(stream, region.write, f"{stream} reads {name} while it is written")
        region.reads[stream] = self._step(stream)

    def write(self, stream: str, name: str) -> None:
        region = self._regions.setdefault(name, _Region())
        self._require(stream, region.write, f"{stream} writes {name} while it is written")
        for reader, step in region.reads.items():
            self._require(stream, (reader, step), f"{stream} writes {name} while {reader} reads it")
        self._regions[name] = _Region(write=(stream, self._step(stream)))

    def _require(self, stream: str, stamp: tuple[str, int] | None, what: str) -> None:
        if stamp is not None and self._known[stream].get(stamp[0], 0) < stamp[1]:
            raise HazardError(f"{what}: no fence orders them")

    def _step(self, stream: str) -> int:
        mine = self._known[stream]
        mine[stream] = mine.get(stream, 0) + 1
        return mine[stream]


class EmulatedDevice:
    """A `Device` whose time is a ledger, paced to real time unless `virtual_clock` is set.

    With a real clock the ledger may run behind by `LAG_TOLERANCE_S` before it is moved up, so that
    a late wake-up is made good by the next one instead of adding up.
    """

    emulated = True
    notes: tuple[str, ...] = ()

    def __init__(self, profile: HardwareProfile, *, virtual_clock: bool = False) -> None:
        self.torch_device = torch.device("cpu")
        self._lock = threading.Lock()
        self._virtual = virtual_clock
        self._ledger = Timeline(profile, 0.0 if virtual_clock else time.perf_counter())
        self._order = HappensBefore()
        self._staging: int | None = None
        self._returned = 0

    def now_s(self) -> float:
        return self._ledger.host_s if self._virtual else time.perf_counter()

    def allocate_slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        return torch.zeros((slots, slot_bytes), dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return host_memory(size_bytes)

    def release_host(self, block: torch.Tensor) -> None:
        """Ordinary memory goes when its last view goes."""

    def is_pinned(self, host: torch.Tensor) -> bool:
        return True

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def begin_layer(self, tokens: int, predictor_bytes: int = 0, forwards: int = 1) -> None:
        with self._lock:
            if not self._virtual:
                lag_from_s = time.perf_counter() - LAG_TOLERANCE_S
                self._ledger.host_s = max(self._ledger.host_s, lag_from_s)
            self._ledger.layer(tokens, predictor_bytes, forwards)
        self._pace()

    def copy(
        self, slot: int, target: torch.Tensor, source: torch.Tensor, ready_s: float, first: bool
    ) -> tuple[float, Fence]:
        with self._lock:
            copy = Stream.COPY.value
            if self._staging is not None:
                self._order.read(copy, f"staging buffer {self._staging}")
                self._staging = None
            self._order.write(copy, f"slot {slot}")
            begins_s, lands_s = self._ledger.copy(target.numel(), ready_s, first)
            fence = EmulatedFence(lands_s, self._order.known(copy))
        target.copy_(source)
        return begins_s, fence

    def stage(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            self._order.write(HOST, f"staging buffer {buffer}")
            self._order.learn(Stream.COPY.value, self._order.known(HOST))
        target.copy_(source)

    def staged(self, buffer: int) -> None:
        self._staging = buffer

    def read(self, size_bytes: int, ordered_s: float, work: Callable[[], None]) -> float:
        with self._lock:
            lands_s = self._ledger.disk(size_bytes, ordered_s)
        work()
        if not self._virtual:
            _sleep_until(lands_s)
        return lands_s

    def launch(self, slot: int, size_bytes: int, tokens: int, compute: Callable[[], None]) -> None:
        with self._lock:
            self._order.read(Stream.COMPUTE.value, f"slot {slot}")
            self._ledger.device_expert(size_bytes, tokens)
        compute()

    def on_cpu(
        self, work: Sequence[tuple[int, int]], backlog_bytes: int, compute: Callable[[], None]
    ) -> float:
        compute()
        with self._lock:
            copying_until_s = self._ledger.copying_until_s(backlog_bytes)
            seconds = self._ledger.cpu_experts(list(work), copying_until_s)
        self._pace()
        return seconds

    def record(self, stream: Stream) -> Fence:
        with self._lock:
            copying = stream is Stream.COPY
            at_s = self._ledger.copy_free_s if copying else self._ledger.compute_free_s
            return EmulatedFence(at_s, self._order.known(stream.value))

    def wait(self, stream: Stream, fence: Fence) -> None:
        assert isinstance(fence, EmulatedFence)
        with self._lock:
            self._order.learn(stream.value, fence.known)
            if stream is Stream.COPY:
                self._ledger.copy_waits(fence.at_s)
            else:
                self._ledger.compute_waits(fence.at_s)

    def synchronize(self, fence: Fence) -> float:
        assert isinstance(fence, EmulatedFence)
        with self._lock:
            self._order.learn(HOST, fence.known)
        if not self._virtual:
            _sleep_until(fence.at_s)
        return fence.at_s

    def reached(self, at_s: float) -> None:
        with self._lock:
            self._ledger.host_s = max(self._ledger.host_s, at_s)

    def busy_until_s(self) -> float:
        return self._ledger.compute_free_s

    def watch_compute(self) -> Callable[[], float]:
        done_s = self._ledger.compute_free_s
        return lambda: done_s

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with self._lock:  # the time of this wait is charged by `begin_layer`
            self._order.learn(ENGINE, self._order.known(Stream.COMPUTE.value))
            self._returned = 0
        return tensors

    def to_host_beside(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tensors

    def to_device(self, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with self._lock:
            compute, place = Stream.COMPUTE.value, f"returning rows {self._returned}"
            self._returned += 1
            self._order.write(ENGINE, place)
            self._order.learn(compute, self._order.known(ENGINE))
            self._order.read(compute, place)
        return rows

    def wait_for_compute(self) -> None:
        with self._lock:
            self._ledger.wait_for_compute()
        self._pace()

    def close(self) -> None:
        """Nothing to give back: everything is ordinary memory."""

    def _pace(self) -> None:
        if not self._virtual:
            _sleep_until(self._ledger.host_s)


def _sleep_until(at_s: float) -> None:
    left_s = at_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)
