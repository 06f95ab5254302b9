"""The link: one chunk of an expert from the store into its slot, with the fences that order it.

Sits over any device. Host memory that the link cannot read directly goes through pinned staging
buffers, one per chunk in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from runtime.core import ExpertId
from runtime.device import Device, Fence, Stream
from runtime.transfer_queue import CHUNKS_IN_FLIGHT, Chunk

CHUNK_S = 100e-6
MIN_CHUNK_BYTES = 4096


def chunk_bytes_for(link_bytes_per_s: float) -> int:
    """Return how many bytes the link moves in 100 us: how long a demand waits for a prefetch."""
    return max(MIN_CHUNK_BYTES, int(link_bytes_per_s * CHUNK_S) // 64 * 64)


class SlotMemory(Protocol):
    """The slots on the device, indexed like a (slots, slot_bytes) uint8 tensor."""

    def __getitem__(self, key: tuple[int, slice], /) -> torch.Tensor: ...


class Link:
    """Issues chunks; the transfer driver is its only caller but for `free` and `take_done`.

    `free(slot)` is called by the engine thread before it orders a copy into `slot`; what the
    compute stream was given until then may still read the slot. `take_done(slot)` is called by the
    engine thread after the transfer landed.
    """

    def __init__(
        self,
        device: Device,
        slots: SlotMemory,
        bytes_of: Callable[[ExpertId], torch.Tensor],
        chunk_bytes: int,
    ) -> None:
        self._device = device
        self._slots = slots
        self._bytes_of = bytes_of
        self._chunk_bytes = chunk_bytes
        self._free: dict[int, Fence] = {}
        self._done: dict[int, Fence] = {}
        self._staging: list[torch.Tensor] = []
        self._staging_read: dict[int, Fence] = {}
        self._next_buffer = 0

    def free(self, slot: int) -> None:
        """Let the next copy into `slot` wait for everything computed so far."""
        self._free[slot] = self._device.record(Stream.COMPUTE)

    def take_done(self, slot: int) -> None:
        """Let what is computed from now on wait for the copy into `slot`."""
        self._device.wait(Stream.COMPUTE, self._done.pop(slot))

    def issue(self, chunk: Chunk) -> tuple[float, Fence]:
        """Put one chunk on the copy stream; return when it begins and its fence.

        Raises:
            TransferError: the device refused the copy.
        """
        if chunk.first:
            self._device.wait(Stream.COPY, self._free.pop(chunk.slot))
        end = chunk.offset_bytes + chunk.size_bytes
        source = self._bytes_of(chunk.expert)[chunk.offset_bytes : end]
        target = self._slots[chunk.slot, chunk.offset_bytes : end]
        buffer = None if self._device.is_pinned(source) else self._stage(source)
        if buffer is not None:
            source = self._staging[buffer][: chunk.size_bytes]
        begins_s, fence = self._device.copy(chunk.slot, target, source, chunk.ready_s, chunk.first)
        if buffer is not None:
            self._staging_read[buffer] = fence
        if chunk.last:
            self._done[chunk.slot] = fence
        return begins_s, fence

    def _stage(self, source: torch.Tensor) -> int:
        if not self._staging:
            allocate = self._device.allocate_host
            self._staging = [allocate(self._chunk_bytes) for _ in range(CHUNKS_IN_FLIGHT)]
        buffer = self._next_buffer
        self._next_buffer = (buffer + 1) % CHUNKS_IN_FLIGHT
        last_read = self._staging_read.pop(buffer, None)
        if last_read is not None:
            self._device.synchronize(last_read)
        self._device.stage(buffer, self._staging[buffer][: source.numel()], source)
        self._device.staged(buffer)
        return buffer
