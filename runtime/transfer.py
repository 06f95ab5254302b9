"""AsyncIO: the thread that copies experts beside the computing, and its virtual-clock twin.

The engine thread gives orders and takes ended transfers; between the two stands one lock. The
thread issues chunks in the queue's order, at most two on the stream, and waits for the oldest, so
a demand overtakes a prefetch within one chunk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from runtime.device import Device, Fence
from runtime.errors import PreScopeError, TransferError
from runtime.link import CHUNK_S, Link
from runtime.transfer_pump import TransferPump
from runtime.transfer_queue import Chunk, Order, QueueState, TransferEnded, TransferQueue

STALLED_S = 10.0


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

    def close(self) -> None: ...


def virtual_transfer(device: Device, link: Link, chunk_bytes: int) -> Transfer:
    """Return the driver for a virtual clock: no thread, landings at their modelled times."""

    def copy(chunk: Chunk) -> tuple[float, float]:
        begins_s, fence = link.issue(chunk)
        return begins_s, device.synchronize(fence)

    return TransferPump(TransferQueue(chunk_bytes), copy)


class TransferThread:
    """The driver for real time. A failure of the thread itself is raised at the next call."""

    def __init__(self, device: Device, link: Link, chunk_bytes: int) -> None:
        self._device = device
        self._stream_free_s = 0.0
        self._byte_s = CHUNK_S / chunk_bytes
        self._link = link
        self._queue = TransferQueue(chunk_bytes)
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
                ended = self._queue.apply(order, now_s)
                if ended is not None:
                    self._ended.append(ended)
            self._changed.notify_all()

    def ended(self, now_s: float, wait: bool) -> list[TransferEnded]:
        if not wait and not self._ended:
            return []
        with self._changed:
            while wait and not self._ended:
                self._raise_failure()
                if not self._changed.wait(STALLED_S):
                    raise TransferError(
                        f"No expert arrived for {STALLED_S:.0f} s "
                        f"({self._queue.backlog_bytes} bytes are waiting).",
                        "The card or its driver hangs; PreScope restarts its engine.",
                    )
            self._raise_failure()
            ended, self._ended = self._ended, []
            return ended

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransferError(
                f"The transfer thread stopped: {self._failure!r}", "Restart the engine."
            ) from self._failure

    def _run(self) -> None:
        try:
            self._copy_until_closed()
        except (PreScopeError, RuntimeError, AssertionError, KeyError, IndexError) as error:
            # Kept for the engine thread, which raises it at its next call.
            with self._changed:
                self._failure = error
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
            note = self._queue.failed if failed else self._queue.landed
            ended = note(chunk, at_s)
            if ended is not None:
                self._ended.append(ended)
                self._changed.notify_all()
