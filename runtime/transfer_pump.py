"""The transfer queue driven under a virtual clock: no thread, every landing at its modelled time.

Pure. The engine under a virtual clock and the simulator both use it; `runtime.transfer` is the
same driver as a thread for real time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.errors import TransferError
from runtime.transfer_queue import Chunk, Order, QueueState, TransferEnded, TransferQueue

CopyChunk = Callable[[Chunk], tuple[float, float]]


@dataclass(frozen=True)
class _Flying:
    chunk: Chunk
    lands_s: float
    failed: bool


class TransferPump:
    """Issues chunks through `copy`, which returns when the chunk begins and when it lands.

    A `TransferError` from `copy` fails the chunk's transfer; every other error is the caller's.
    """

    def __init__(self, queue: TransferQueue, copy: CopyChunk) -> None:
        self._queue = queue
        self._copy = copy
        self._flying: deque[_Flying] = deque()
        self._ended: list[TransferEnded] = []
        self.busy_s = 0.0

    @property
    def backlog_bytes(self) -> int:
        return self._queue.backlog_bytes

    def state(self, now_s: float) -> QueueState:
        """Return what waits for the link at `now_s`."""
        self._run(now_s)
        return self._queue.state(self._flying[-1].lands_s if self._flying else now_s)

    @property
    def issued_bytes(self) -> int:
        return self._queue.issued_bytes

    @property
    def pending_bytes(self) -> int:
        """Bytes issued for transfers whose end nobody has been told yet."""
        return self._queue.pending_bytes + sum(event.issued_bytes for event in self._ended)

    def order(self, orders: Sequence[Order], now_s: float) -> None:
        """Carry out orders given at `now_s`; what landed before comes first."""
        self._run(now_s)
        for order in orders:
            ended = self._queue.apply(order, now_s)
            if ended is not None:
                self._ended.append(ended)
        self._run(now_s)

    def ended(self, now_s: float, wait: bool) -> list[TransferEnded]:
        """Return what ended up to `now_s`; with `wait`, run on until something has."""
        self._run(now_s)
        while wait and not self._ended:
            assert self._flying, "waiting for a transfer that nobody ordered"
            self._run(self._flying[0].lands_s)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Nothing to end: there is no thread."""

    def _run(self, until_s: float) -> None:
        while True:
            self._issue()
            if not self._flying or self._flying[0].lands_s > until_s:
                return
            flying = self._flying.popleft()
            note = self._queue.failed if flying.failed else self._queue.landed
            ended = note(flying.chunk, flying.lands_s)
            if ended is not None:
                self._ended.append(ended)

    def _issue(self) -> None:
        while (chunk := self._queue.next_chunk()) is not None:
            try:
                begins_s, lands_s = self._copy(chunk)
            except TransferError:
                self._flying.append(_Flying(chunk, chunk.ready_s, failed=True))
            else:
                self.busy_s += lands_s - begins_s
                self._flying.append(_Flying(chunk, lands_s, failed=False))
