"""An NVIDIA card: streams for copies, computing and reading back, events as fences.

Host slabs are ordinary memory registered with the driver: torch's own pinned allocator rounds
sizes up to powers of two, which a slab of tens of gigabytes cannot afford. Where the driver
refuses (Windows and WSL cap pinned memory), the slab stays unpinned and the link stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from mmap import PAGESIZE

import torch

from runtime.core import HardwareProfile
from runtime.device import Fence, Stream
from runtime.device_pinned import PinnedPlaces
from runtime.errors import MemoryPlanError, TransferError

_CUDA_SUCCESS = 0
_SMALL_BYTES = 16 * 2**20


class CudaFence:
    """An event on one of the two streams."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # A blocking event lets the waiting thread sleep instead of spinning with a core.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)


class CudaDevice:
    """A `Device` on the current CUDA card, capped at `budget_bytes` of its memory.

    What it foresees of its own computing goes by the rates of `profile`; at most
    `profile.pinnable_bytes` of host memory are pinned, small buffers apart.
    """

    emulated = False

    def __init__(self, profile: HardwareProfile, budget_bytes: int) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.notes: tuple[str, ...] = ()
        total_bytes = torch.cuda.get_device_properties(self.torch_device).total_memory
        share = min(1.0, budget_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, self.torch_device)
        self._streams = {
            Stream.COPY: torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
            Stream.COMPUTE: torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
        }
        self._reading: torch.cuda.Stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        # Recorded anew in every layer. Not blocking: sleeping and waking would take as long as a
        # layer's routing does.
        self._routed = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._computed = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._routed_s = self._busy_until_s = 0.0
        self._expert_byte_s = 1.0 / profile.device_bytes_per_s.value
        self._tokens_per_pass = profile.device_tokens_per_pass.value
        self._places = PinnedPlaces(_pinned)
        self._pinnable_bytes = profile.pinnable_bytes
        self._registered: dict[int, torch.Tensor] = {}
        self._registered_bytes = 0
        self._refused_bytes: int | None = None

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
        if size_bytes == 0 or not self._may_pin(size_bytes):
            return torch.empty(size_bytes, dtype=torch.uint8)
        # Whole pages of its own: a page that is registered cannot be registered once more.
        whole_bytes = -(-size_bytes // PAGESIZE) * PAGESIZE
        pages = torch.empty(whole_bytes + PAGESIZE, dtype=torch.uint8)
        begin = -pages.data_ptr() % PAGESIZE
        slab = pages[begin : begin + size_bytes]
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(slab.data_ptr(), whole_bytes, 0))
        if code == _CUDA_SUCCESS:
            self._registered[pages.data_ptr()] = slab
            self._registered_bytes += size_bytes
        else:
            self._forget_refusal()
            self._note_refusal(size_bytes)
        return slab

    def _may_pin(self, size_bytes: int) -> bool:
        if self._refused_bytes is not None and size_bytes >= self._refused_bytes:
            return False
        if self._pinnable_bytes is None or size_bytes <= _SMALL_BYTES:
            return True
        return self._registered_bytes + size_bytes <= self._pinnable_bytes

    def _note_refusal(self, size_bytes: int) -> None:
        self._refused_bytes = size_bytes  # as much is not asked for again: each time takes long
        self.notes = (
            f"The driver refused to pin {size_bytes / 2**20:.0f} MiB of memory beside the"
            f" {self._registered_bytes / 2**30:.2f} GiB that are pinned: experts outside those take"
            " a slower way to the card.",
        )

    def _forget_refusal(self) -> None:
        # The driver keeps a refusal until somebody reads it: else the next kernel would fail.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device).add_(1)

    def release_host(self, block: torch.Tensor) -> None:
        if self._registered.pop(block.untyped_storage().data_ptr(), None) is not None:
            self._registered_bytes -= block.numel()
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(block.data_ptr())

    def is_pinned(self, host: torch.Tensor) -> bool:
        return host.untyped_storage().data_ptr() in self._registered

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
        passes = 1 + (tokens - 1) / self._tokens_per_pass
        from_s = max(self._busy_until_s, time.perf_counter())
        self._busy_until_s = from_s + passes * size_bytes * self._expert_byte_s

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
        return self._busy_until_s

    def watch_compute(self) -> Callable[[], float]:
        self._computed.record(self._streams[Stream.COMPUTE])

        def done_s() -> float:
            if not self._computed.query():  # type: ignore[no-untyped-call]
                return time.perf_counter()
            computing_ms: float = self._routed.elapsed_time(self._computed)
            return self._routed_s + computing_ms / 1000

        return done_s

    def wait_for_compute(self) -> None:
        self._streams[Stream.COMPUTE].synchronize()

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # The compute stream orders these copies behind those that still read the same places.
        self._places.start_over()
        found = self._copied(tensors)
        self._routed.record(self._streams[Stream.COMPUTE])
        self._routed.synchronize()
        self._routed_s = self._busy_until_s = time.perf_counter()
        return found

    def to_host_beside(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.cuda.stream(self._reading):
            self._reading.wait_event(self._routed)
            found = self._copied(tensors)
            self._read.record(self._reading)
        self._read.synchronize()
        return found

    def to_device(self, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        counts = [len(mine) for mine in rows]
        shape = torch.Size((sum(counts), rows[0].shape[1]))
        together = self._places.take(shape, rows[0].dtype)
        torch.cat([*rows], out=together)
        home = together.to(self.torch_device, non_blocking=True)
        pieces: tuple[torch.Tensor, ...] = home.split(counts)  # type: ignore[no-untyped-call]
        return pieces

    def _copied(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Queue copies of device tensors on the current stream."""
        take = self._places.take
        return [take(one.shape, one.dtype).copy_(one, non_blocking=True) for one in tensors]

    def close(self) -> None:
        for stream in (*self._streams.values(), self._reading):
            stream.synchronize()
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for slab in self._registered.values():
            cudart.cudaHostUnregister(slab.data_ptr())
        self._registered.clear()
        torch.cuda.empty_cache()


def _pinned(size_bytes: int) -> torch.Tensor:
    """Return pinned memory, or ordinary memory, with which the same copies are only slower."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size_bytes, dtype=torch.uint8)
