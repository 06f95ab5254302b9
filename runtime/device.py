"""The one seam to hardware: what the executor, the link and the transfer driver may ask of it.

`CudaDevice` and `EmulatedDevice` keep the same promises; `HostDevice` has no slots and computes in
place. Which one it is, is chosen once, in `device_choice`; nothing else asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol

import torch


class Stream(Enum):
    """Work on one stream runs in order; between streams only fences order anything."""

    COPY = "copy"
    COMPUTE = "compute"


class Fence(Protocol):
    """A point on a stream. Opaque to everyone but the device that recorded it."""


class Crossing(Protocol):
    """How a layer's rows reach the CPU and come back. The engine thread calls it, `computing`."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Wait for the compute stream, once, and return `tensors` as the CPU may read them.

        What was returned, and what `to_device` was given, is valid until the next call.
        """
        ...

    def to_host_beside(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `tensors`, computed before the last `to_host`, without waiting for what the
        compute stream was given since."""
        ...

    def to_device(self, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return what the CPU computed, matrices of one width, for what the compute stream is
        given from now on; do not wait for it."""
        ...


class Device(Crossing, Protocol):
    """A card with slots, or something that behaves like one.

    The engine thread calls everything but `copy`, `stage`, `read` and `synchronize`, which the
    transfer driver calls, and `now_s`, which anybody may call. Times are seconds of `now_s`.
    """

    torch_device: torch.device
    emulated: bool
    notes: tuple[str, ...]
    """Sentences for a person about what the system refused."""

    def now_s(self) -> float:
        """Return the time all stamps of this device are on."""
        ...

    def allocate_slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        """Return (slots, slot_bytes) uint8 on the device, allocated once; never freed while used.

        Raises:
            MemoryPlanError: the device has not got that much.
        """
        ...

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        """Return `size_bytes` uint8 of host memory, pinned where the system allows it."""
        ...

    def release_host(self, block: torch.Tensor) -> None:
        """Take back what `allocate_host` returned; nothing reads it any more."""
        ...

    def is_pinned(self, host: torch.Tensor) -> bool:
        """Say whether the link may read `host` directly."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """Return the context in which a forward pass runs on the compute stream."""
        ...

    def begin_layer(self, tokens: int, predictor_bytes: int = 0, forwards: int = 1) -> None:
        """Note that a MoE layer of `tokens` rows starts; its routing has reached the host.

        `predictor_bytes` of weights were read to guess what comes next. The rows are those of
        `forwards` sequences, each of which ran its own forward up to here.
        """
        ...

    def copy(
        self, slot: int, target: torch.Tensor, source: torch.Tensor, ready_s: float, first: bool
    ) -> tuple[float, Fence]:
        """Copy bytes into a slot on the copy stream; return when it begins and its done fence.

        Raises:
            TransferError: the copy could not be issued.
        """
        ...

    def stage(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Fill a staging buffer from host memory that the link cannot read directly."""
        ...

    def staged(self, buffer: int) -> None:
        """Note that the next copy reads from staging buffer `buffer`."""
        ...

    def read(self, size_bytes: int, ordered_s: float, work: Callable[[], None]) -> float:
        """Run `work`, which reads that much from the disk and raises nothing; return when it was
        done. Any thread calls it, several at once."""
        ...

    def launch(self, slot: int, size_bytes: int, tokens: int, compute: Callable[[], None]) -> None:
        """Run `compute`, which reads `slot`, on the compute stream without waiting for it."""
        ...

    def on_cpu(
        self, work: Sequence[tuple[int, int]], backlog_bytes: int, compute: Callable[[], None]
    ) -> float:
        """Run `compute` for experts of (bytes, tokens) on the CPU; return the seconds it took."""
        ...

    def record(self, stream: Stream) -> Fence:
        """Return a fence behind all that is on `stream` now."""
        ...

    def wait(self, stream: Stream, fence: Fence) -> None:
        """Let what follows on `stream` wait for `fence`; the caller does not wait."""
        ...

    def synchronize(self, fence: Fence) -> float:
        """Let the calling thread wait for `fence`; return when it was reached."""
        ...

    def reached(self, at_s: float) -> None:
        """Tell the device that the engine thread saw something that happened at `at_s`."""
        ...

    def busy_until_s(self) -> float:
        """Return when the compute stream will be idle, as far as the device can foresee."""
        ...

    def watch_compute(self) -> Callable[[], float]:
        """Return what tells, when it is asked, since when the compute stream has been done with
        all that is on it now; while it is not, that is the time of asking."""
        ...

    def wait_for_compute(self) -> None:
        """Let the engine thread wait for the compute stream."""
        ...

    def close(self) -> None:
        """Give everything back; the device is not used again."""
        ...
