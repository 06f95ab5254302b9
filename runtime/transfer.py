"""AsyncIO: the threads that read and copy experts beside the computing, and their virtual twin.

The engine thread gives orders and takes ended transfers; between it and the others stands one
lock. The copying thread issues chunks in the queue's order, at most two on the stream, and waits
for the oldest, so a demand overtakes a prefetch within one chunk. Experts that RAM does not hold
are read from disk by a few threads more, several at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from runtime.core import ExpertId
from runtime.device import Device, Fence
from runtime.disk import Disk
from runtime.errors import PreScopeError, TransferError
from runtime.link import CHUNK_S, Link
from runtime.ram_tier import READS_IN_FLIGHT, Read
from runtime.supply import Supply
from runtime.transfer_pump import TransferPump
from runtime.transfer_queue import Chunk, Order, QueueState, TransferEnded, TransferQueue

STALLED_S = 10.0
READ_STALLED_S = 60.0
"""A disk that sleeps needs a while; a drive that was unplugged fails by itself."""
_OURS = (
    PreScopeError,
    RuntimeError,
    AssertionError,
    KeyError,
    IndexError,
    ValueError,
    MemoryError,
    OSError,
)
"""What a mistake of ours, or a device in trouble, may raise in a thread."""


class Transfer(Protocol):
    """What the executor needs of either driver. All calls come from the engine thread."""

    busy_s: float

    @property
    def backlog_bytes(self) -> int: ...

    def state(self, now_s: float) -> QueueState:
        """Return what waits for the link."""
        ...

    @property
    def issued_bytes(self) -> int: ...

    @property
    def pending_bytes(self) -> int: ...

    def order(self, orders: Sequence[Order], now_s: float) -> None: ...

    def ended(self, now_s: float, wait: bool) -> list[TransferEnded]:
        """Return what ended since the last call; with `wait`, at least one.

        Raises:
            TransferError: nothing moves any more.
        """
        ...

    def used(self, layer: int, experts: Iterable[int], token: float) -> None:
        """Note which experts of a layer are used, wherever they are."""
        ...

    def fetch(self, experts: Sequence[ExpertId], now_s: float) -> tuple[list[ExpertId], float]:
        """Let the CPU have as many of `experts` as RAM holds, one at least; say since when.

        All that are missing are read meanwhile. What was fetched stays until `let_go`.

        Raises:
            ModelFilesError: one of them could not be read.
            TransferError: nothing moves any more.
        """
        ...

    def let_go(self, experts: Sequence[ExpertId], now_s: float) -> None:
        """The CPU has computed these."""
        ...

    def abandon(self) -> None:
        """The CPU gives up what it fetched or waits for."""
        ...

    def resize_ram(self, places: int) -> int:
        """Keep only so many experts in RAM; return how many places are still in use."""
        ...

    def close(self) -> None: ...


def virtual_transfer(
    device: Device, link: Link, chunk_bytes: int, disk: Disk | None = None
) -> Transfer:
    """Return the driver for a virtual clock: no thread, landings at their modelled times."""

    def copy(chunk: Chunk) -> tuple[float, float]:
        begins_s, fence = link.issue(chunk)
        return begins_s, device.synchronize(fence)

    def read(read: Read) -> tuple[float, PreScopeError | None]:
        assert disk is not None
        return disk.read(device, read)

    return TransferPump(TransferQueue(chunk_bytes), copy, None if disk is None else disk.tier, read)


class TransferThread:
    """The driver for real time. A failure of a thread itself is raised at the next call."""

    def __init__(
        self, device: Device, link: Link, chunk_bytes: int, disk: Disk | None = None
    ) -> None:
        self._device = device
        self._stream_free_s = 0.0
        self._byte_s = CHUNK_S / chunk_bytes
        self._link = link
        self._queue = TransferQueue(chunk_bytes)
        self._disk = disk
        self._supply = Supply(self._queue, None if disk is None else disk.tier)
        # Its threads start with the first read: most machines never read again.
        self._readers = ThreadPoolExecutor(READS_IN_FLIGHT, "prescope-disk")
        self._changed = threading.Condition()
        self._ended: list[TransferEnded] = []
        self._failure: BaseException | None = None
        self._closing = False
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="prescope-transfer", daemon=True)
        self._thread.start()

    @property
    def backlog_bytes(self) -> int:
        with self._changed:
            return self._queue.backlog_bytes

    def state(self, now_s: float) -> QueueState:
        with self._changed:
            return self._queue.state(max(now_s, self._stream_free_s))

    @property
    def issued_bytes(self) -> int:
        return self._queue.issued_bytes

    @property
    def pending_bytes(self) -> int:
        with self._changed:
            ended = sum(event.issued_bytes for event in self._ended)
            return self._queue.pending_bytes + ended

    def order(self, orders: Sequence[Order], now_s: float) -> None:
        with self._changed:
            self._raise_failure()
            for order in orders:
                ended = self._supply.apply(order, now_s)
                if ended is not None:
                    self._ended.append(ended)
            self._supplied(now_s)

    def ended(self, now_s: float, wait: bool) -> list[TransferEnded]:
        if not wait and not self._ended:
            return []
        with self._changed:
            while wait and not self._ended:
                self._wait()
            self._raise_failure()
            ended, self._ended = self._ended, []
            return ended

    def used(self, layer: int, experts: Iterable[int], token: float) -> None:
        if self._supply.tier is not None:
            with self._changed:
                self._supply.tier.used(layer, experts, token)

    def fetch(self, experts: Sequence[ExpertId], now_s: float) -> tuple[list[ExpertId], float]:
        if self._supply.tier is None:
            return list(experts), now_s
        with self._changed:
            self._supply.ask(experts)
            self._supplied(now_s)
            waited = False
            while not (held := self._supply.held(experts)):
                self._wait()
                waited = True
        return held, self._device.now_s() if waited else now_s

    def let_go(self, experts: Sequence[ExpertId], now_s: float) -> None:
        if self._supply.tier is not None:
            with self._changed:
                self._supply.let_go(experts)
                self._supplied(now_s)

    def abandon(self) -> None:
        with self._changed:
            self._supply.abandon()

    def resize_ram(self, places: int) -> int:
        tier = self._supply.tier
        assert tier is not None
        with self._changed:
            tier.resize(places)
            return tier.used_up_to

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        """Wait until anything changes."""
        self._raise_failure()
        tier = self._supply.tier
        limit_s = READ_STALLED_S if tier is not None and tier.reading else STALLED_S
        if not self._changed.wait(limit_s):
            raise TransferError(
                f"No expert arrived for {limit_s:.0f} s "
                f"({self._queue.backlog_bytes} bytes are waiting).",
                "The card, its driver or the disk hangs; PreScope restarts its engine.",
            )

    def _supplied(self, now_s: float) -> None:
        """Start the reads that may begin, and let everybody look again. Under the lock."""
        for read in self._supply.reads(now_s):
            self._readers.submit(self._read, read)
        self._changed.notify_all()

    def _read(self, read: Read) -> None:
        """Read one expert, on a thread of its own."""
        assert self._disk is not None
        try:
            at_s, error = self._disk.read(self._device, read)
            with self._changed:
                if error is None:
                    self._supply.read_done(read)
                else:
                    self._ended += self._supply.read_failed(read, at_s, error)
                if not self._closing:
                    self._supplied(at_s)
        except _OURS as failure:
            self._fail(failure)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransferError(
                f"The transfer thread stopped: {self._failure!r}", "Restart the engine."
            ) from self._failure

    def _run(self) -> None:
        try:
            self._copy_until_closed()
        except _OURS as failure:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        """Keep a failure for the engine thread, which raises it at its next call."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _copy_until_closed(self) -> None:
        flying: deque[tuple[Chunk, float, Fence]] = deque()
        lands_s = 0.0
        while True:
            with self._changed:
                chunk = self._queue.next_chunk()
                while chunk is None and not flying:
                    if self._closing:
                        return
                    self._changed.wait()
                    chunk = self._queue.next_chunk()
            if chunk is not None:
                try:
                    begins_s, fence = self._link.issue(chunk)
                except TransferError:
                    self._note(chunk, self._device.now_s(), failed=True)
                else:
                    begins_s = max(begins_s, self._stream_free_s)
                    self._stream_free_s = begins_s + chunk.size_bytes * self._byte_s
                    flying.append((chunk, begins_s, fence))
                continue
            landed, begins_s, fence = flying.popleft()
            before_s, lands_s = lands_s, self._device.synchronize(fence)
            self.busy_s += lands_s - max(begins_s, before_s)
            left_bytes = sum(behind.size_bytes for behind, _, _ in flying)
            self._stream_free_s = lands_s + left_bytes * self._byte_s
            self._note(landed, lands_s, failed=False)

    def _note(self, chunk: Chunk, at_s: float, failed: bool) -> None:
        with self._changed:
            ended = self._supply.chunk_done(chunk, at_s, failed=failed)
            if ended is not None:
                self._ended.append(ended)
                self._supplied(at_s)
