"""The supply of experts under a virtual clock: no thread, every landing at its modelled time.

Pure. The engine under a virtual clock and the simulator both use it; `runtime.transfer` is the
same driver as threads for real time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from runtime.core import ExpertId
from runtime.errors import PreScopeError, TransferError
from runtime.ram_tier import RamTier, Read
from runtime.supply import Supply
from runtime.transfer_queue import Chunk, Order, QueueState, TransferEnded, TransferQueue

CopyChunk = Callable[[Chunk], tuple[float, float]]
ReadExpert = Callable[[Read], tuple[float, PreScopeError | None]]


@dataclass(frozen=True)
class _Flying:
    chunk: Chunk
    lands_s: float
    failed: bool


@dataclass(frozen=True)
class _Reading:
    read: Read
    lands_s: float
    error: PreScopeError | None


class TransferPump:
    """Issues chunks through `copy`, which returns when the chunk begins and when it lands.

    Experts that `tier` does not hold come through `read`, which returns when they land, and why
    they did not. A `TransferError` from `copy` fails the chunk's transfer; every other error is
    the caller's.
    """

    def __init__(
        self,
        queue: TransferQueue,
        copy: CopyChunk,
        tier: RamTier | None = None,
        read: ReadExpert | None = None,
    ) -> None:
        assert tier is None or read is not None, "a tier of experts and nothing that reads them"
        self._queue = queue
        self._supply = Supply(queue, tier)
        self._copy = copy
        self._read = read
        self._flying: deque[_Flying] = deque()
        self._reading: deque[_Reading] = deque()
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
            ended = self._supply.apply(order, now_s)
            if ended is not None:
                self._ended.append(ended)
        self._issue(now_s)
        self._run(now_s)

    def ended(self, now_s: float, wait: bool) -> list[TransferEnded]:
        """Return what ended up to `now_s`; with `wait`, run on until something has."""
        self._run(now_s)
        while wait and not self._ended:
            self._run(self._next_s())
        ended, self._ended = self._ended, []
        return ended

    def used(self, layer: int, experts: Iterable[int], token: float) -> None:
        """Note which experts of a layer are used, wherever they are."""
        if self._supply.tier is not None:
            self._supply.tier.used(layer, experts, token)

    def fetch(self, experts: Sequence[ExpertId], now_s: float) -> tuple[list[ExpertId], float]:
        """Let the CPU have as many of `experts` as RAM holds, one at least; say since when.

        All that are missing are read meanwhile. What was fetched stays until `let_go`.

        Raises:
            ModelFilesError: one of them could not be read.
        """
        self._run(now_s)
        self._supply.ask(experts)
        self._issue(now_s)
        at_s = now_s
        while not (held := self._supply.held(experts)):
            at_s = max(at_s, self._next_s())
            self._run(at_s)
        return held, at_s

    def let_go(self, experts: Sequence[ExpertId], now_s: float) -> None:
        """The CPU has computed these."""
        self._run(now_s)
        self._supply.let_go(experts)
        self._issue(now_s)

    def abandon(self) -> None:
        """The CPU gives up what it fetched or waits for."""
        self._supply.abandon()

    def resize_ram(self, places: int) -> int:
        """Keep only so many experts in RAM; return how many places are still in use."""
        tier = self._supply.tier
        assert tier is not None
        tier.resize(places)
        return tier.used_up_to

    def close(self) -> None:
        """Nothing to end: there is no thread."""

    def _next_s(self) -> float:
        """Return when the next chunk or read lands."""
        times = [events[0].lands_s for events in (self._flying, self._reading) if events]
        assert times, "waiting for a transfer that nobody ordered"
        return min(times)

    def _run(self, until_s: float) -> None:
        """Let everything land that does by `until_s`, in the order of time."""
        while self._flying or self._reading:
            at_s = self._next_s()
            if at_s > until_s:
                return
            if self._flying and self._flying[0].lands_s == at_s:
                flying = self._flying.popleft()
                ended = self._supply.chunk_done(flying.chunk, at_s, failed=flying.failed)
                if ended is not None:
                    self._ended.append(ended)
            else:
                reading = self._reading.popleft()
                if reading.error is None:
                    self._supply.read_done(reading.read)
                else:
                    self._ended += self._supply.read_failed(reading.read, at_s, reading.error)
            self._issue(at_s)

    def _issue(self, now_s: float) -> None:
        for read in self._supply.reads(now_s):
            assert self._read is not None
            self._reading.append(_Reading(read, *self._read(read)))
        while (chunk := self._queue.next_chunk()) is not None:
            try:
                begins_s, lands_s = self._copy(chunk)
            except TransferError:
                self._flying.append(_Flying(chunk, chunk.ready_s, failed=True))
            else:
                self.busy_s += lands_s - begins_s
                self._flying.append(_Flying(chunk, lands_s, failed=False))
