"""No card at all: experts are computed in place on the CPU, unthrottled, and there are no slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from runtime.device import Fence, Stream
from runtime.device_host_memory import host_memory


class HostDevice:
    """A `Device` for `cpu-only`: whatever would need a slot or the link is a bug here."""

    emulated = False
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def now_s(self) -> float:
        return time.perf_counter()

    def allocate_slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        assert slots == 0, f"{slots} slots without a card"
        return torch.empty((0, slot_bytes), dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return host_memory(size_bytes)

    def release_host(self, block: torch.Tensor) -> None:
        """Ordinary memory goes when its last view goes."""

    def is_pinned(self, host: torch.Tensor) -> bool:
        return True

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def begin_layer(self, tokens: int, predictor_bytes: int = 0, forwards: int = 1) -> None:
        """Nothing is charged here."""

    def copy(
        self, slot: int, target: torch.Tensor, source: torch.Tensor, ready_s: float, first: bool
    ) -> tuple[float, Fence]:
        raise AssertionError(f"a copy into slot {slot} without a card")

    def stage(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        raise AssertionError(f"staging buffer {buffer} without a card")

    def staged(self, buffer: int) -> None:
        raise AssertionError(f"staging buffer {buffer} without a card")

    def read(self, size_bytes: int, ordered_s: float, work: Callable[[], None]) -> float:
        work()
        return time.perf_counter()

    def launch(self, slot: int, size_bytes: int, tokens: int, compute: Callable[[], None]) -> None:
        raise AssertionError(f"a launch from slot {slot} without a card")

    def on_cpu(
        self, work: Sequence[tuple[int, int]], backlog_bytes: int, compute: Callable[[], None]
    ) -> float:
        began_s = time.perf_counter()
        compute()
        return time.perf_counter() - began_s

    def record(self, stream: Stream) -> Fence:
        raise AssertionError(f"a fence on the {stream.value} stream without a card")

    def wait(self, stream: Stream, fence: Fence) -> None:
        raise AssertionError(f"a wait on the {stream.value} stream without a card")

    def synchronize(self, fence: Fence) -> float:
        raise AssertionError("a fence without a card")

    def reached(self, at_s: float) -> None:
        """Real time needs no telling."""

    def busy_until_s(self) -> float:
        return 0.0

    def watch_compute(self) -> Callable[[], float]:
        raise AssertionError("a wait for the link without a card")

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tensors

    def to_host_beside(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tensors

    def to_device(self, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return rows

    def wait_for_compute(self) -> None:
        """The CPU has computed when the call returns."""

    def close(self) -> None:
        """Nothing to give back: everything is ordinary memory."""
