"""An NVIDIA card: a copy stream and a compute stream, events as fences, pinned slabs.

Host slabs are ordinary memory registered with the driver: torch's own pinned allocator rounds
sizes up to powers of two, which a slab of tens of gigabytes cannot afford. Where the driver
refuses (Windows and WSL cap pinned memory), the slab stays unpinned and the link stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress

import torch

from runtime.device import Fence, Stream
from runtime.errors import MemoryPlanError, TransferError

_CUDA_SUCCESS = 0


class CudaFence:
    """An event on one of the two streams."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # A blocking event lets the waiting thread sleep instead of spinning with a core.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)


class CudaDevice:
    """A `Device` on the current CUDA card, capped at `budget_bytes` of its memory."""

    emulated = False

    def __init__(self, budget_bytes: int) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        total_bytes = torch.cuda.get_device_properties(self.torch_device).total_memory
        share = min(1.0, budget_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, self.torch_device)
        self._streams = {
            Stream.COPY: torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
            Stream.COMPUTE: torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
        }
        self._registered: dict[int, torch.Tensor] = {}

    def now_s(self) -> float:
        return time.perf_counter()

    def allocate_slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        try:
            slab = torch.zeros((slots, slot_bytes), dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(
                f"The card has no room for {slots} expert slots of {slot_bytes / 2**20:.1f} MiB.",
                "Close other programs that use the card, or lower the VRAM limit in the settings.",
            ) from error
        # The zeroes were written on the default stream; neither of ours may overtake them.
        default = torch.cuda.current_stream(self.torch_device)
        for stream in self._streams.values():
            stream.wait_stream(default)
        return slab

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        slab = torch.empty(size_bytes, dtype=torch.uint8)
        if size_bytes == 0:
            return slab
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(slab.data_ptr(), size_bytes, 0))
        if code == _CUDA_SUCCESS:
            self._registered[slab.data_ptr()] = slab
        else:
            self._forget_refusal()
        return slab

    def _forget_refusal(self) -> None:
        # The driver keeps a refusal until somebody reads it: else the next kernel would fail.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device).add_(1)

    def release_host(self, block: torch.Tensor) -> None:
        if self._registered.pop(block.data_ptr(), None) is not None:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(block.data_ptr())

    def is_pinned(self, host: torch.Tensor) -> bool:
        address = host.data_ptr()
        # The transfer thread asks while the engine thread may give blocks back.
        registered = list(self._registered.items())
        return any(base <= address < base + slab.numel() for base, slab in registered)

    def computing(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(self._streams[Stream.COMPUTE])
        return context

    def begin_layer(self, tokens: int, predictor_bytes: int = 0, forwards: int = 1) -> None:
        """Real time needs no charging; the caller's read of the routing was the wait."""

    def copy(
        self, slot: int, target: torch.Tensor, source: torch.Tensor, ready_s: float, first: bool
    ) -> tuple[float, Fence]:
        stream = self._streams[Stream.COPY]
        begins_s = time.perf_counter()
        try:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        except RuntimeError as error:
            raise TransferError(
                f"The copy of {source.numel()} bytes into slot {slot} failed: {error}",
                "If it happens again, restart PreScope; the card may have been reset.",
            ) from error
        return begins_s, CudaFence(stream)

    def stage(self, buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def staged(self, buffer: int) -> None:
        """The copy's own fence says when the buffer is free again."""

    def read(self, size_bytes: int, ordered_s: float, work: Callable[[], None]) -> float:
        work()
        return time.perf_counter()

    def launch(self, slot: int, size_bytes: int, tokens: int, compute: Callable[[], None]) -> None:
        compute()

    def on_cpu(
        self, work: Sequence[tuple[int, int]], backlog_bytes: int, compute: Callable[[], None]
    ) -> float:
        began_s = time.perf_counter()
        compute()
        return time.perf_counter() - began_s

    def record(self, stream: Stream) -> Fence:
        return CudaFence(self._streams[stream])

    def wait(self, stream: Stream, fence: Fence) -> None:
        assert isinstance(fence, CudaFence)
        self._streams[stream].wait_event(fence.event)

    def synchronize(self, fence: Fence) -> float:
        assert isinstance(fence, CudaFence)
        fence.event.synchronize()
        return time.perf_counter()

    def reached(self, at_s: float) -> None:
        """Real time needs no telling."""

    def busy_until_s(self) -> float:
        return 0.0

    def wait_for_compute(self) -> None:
        self._streams[Stream.COMPUTE].synchronize()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for address in self._registered:
            cudart.cudaHostUnregister(address)
        self._registered.clear()
        torch.cuda.empty_cache()
