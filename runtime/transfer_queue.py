"""What the link copies next: transfers, their chunks, and the order between them.

Pure, no threads. Whoever drives the queue (the transfer thread under its lock, or the pump under
a virtual clock) issues one chunk at a time, so a demand overtakes a prefetch at the next chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from runtime.core import ExpertId

CHUNKS_IN_FLIGHT = 2
PREFETCHES_IN_FLIGHT = 1
"""A demand waits for what is on the stream: never for more than one chunk of a prefetch."""


class Cause(Enum):
    DEMAND = "on demand"
    PREFETCH = "prefetch"


class Outcome(Enum):
    LANDED = "landed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class Submit:
    """Order: copy `expert` into `slot`. Prefetches go by `deadline_s`, demands by age."""

    expert: ExpertId
    slot: int
    size_bytes: int
    cause: Cause
    deadline_s: float = 0.0


@dataclass(frozen=True)
class Promote:
    """Order: somebody waits for this prefetch now."""

    expert: ExpertId


@dataclass(frozen=True)
class Cancel:
    """Order: give this transfer up; its slot comes back once no chunk of it is on the stream."""

    expert: ExpertId


@dataclass(frozen=True)
class Hold:
    """Order: issue no prefetches until the next `Hold(False)`; demands go on."""

    on: bool


Order = Submit | Promote | Cancel | Hold


@dataclass(frozen=True)
class Chunk:
    """A piece of one transfer on its way: `offset_bytes` to `offset_bytes + size_bytes`."""

    expert: ExpertId
    slot: int
    offset_bytes: int
    size_bytes: int
    ready_s: float
    first: bool
    last: bool


@dataclass(frozen=True)
class TransferEnded:
    """A transfer left the queue at `at_s`; `issued_bytes` of it went over the link.

    `bytes_s` is when RAM had its bytes, which it did not have when the transfer was ordered.
    """

    expert: ExpertId
    slot: int
    outcome: Outcome
    issued_bytes: int
    at_s: float
    bytes_s: float = 0.0


NOTHING_LEFT: Mapping[ExpertId, int] = MappingProxyType({})


class QueueState(NamedTuple):
    """What the link still has to move. `stream_free_s` is when what is on its stream will have
    landed; behind that wait `demanded_bytes` for somebody and `backlog_bytes` in all.

    `unstarted` are prefetches of which nothing was issued; `left_bytes` is what was not yet
    issued of the transfers that did begin.
    """

    stream_free_s: float
    demanded_bytes: int = 0
    backlog_bytes: int = 0
    unstarted: frozenset[ExpertId] = frozenset()
    left_bytes: Mapping[ExpertId, int] = NOTHING_LEFT


@dataclass
class _Transfer:
    order: Submit
    submitted_s: float
    demanded: bool
    issued_bytes: int = 0
    in_flight: int = 0
    cancelled: bool = False
    failed: bool = False
    in_ram: bool = True
    bytes_s: float = 0.0


class TransferQueue:
    """Transfers by expert; at most `CHUNKS_IN_FLIGHT` chunks issued and not yet landed."""

    def __init__(self, chunk_bytes: int) -> None:
        assert chunk_bytes > 0, chunk_bytes
        self._chunk_bytes = chunk_bytes
        self._transfers: dict[ExpertId, _Transfer] = {}
        self._in_flight = 0
        self._held = False
        self._resumed_s = 0.0
        self.issued_bytes = 0

    def __len__(self) -> int:
        return len(self._transfers)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._transfers

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def backlog_bytes(self) -> int:
        """Bytes that were asked for, not yet issued, in RAM, and not held."""
        return sum(
            t.order.size_bytes - t.issued_bytes
            for t in self._transfers.values()
            if not (t.cancelled or t.failed) and t.in_ram and (t.demanded or not self._held)
        )

    def state(self, stream_free_s: float) -> QueueState:
        """Return what waits behind the chunks on the stream, which land by `stream_free_s`."""
        if not self._transfers:
            return QueueState(stream_free_s)
        demanded_bytes = backlog_bytes = 0
        unstarted, left = [], {}
        for expert, transfer in self._transfers.items():
            if transfer.cancelled or transfer.failed:
                continue
            rest_bytes = transfer.order.size_bytes - transfer.issued_bytes
            backlog_bytes += rest_bytes
            if transfer.demanded:
                demanded_bytes += rest_bytes
            elif not transfer.issued_bytes:
                unstarted.append(expert)
            if transfer.issued_bytes:
                left[expert] = rest_bytes
        return QueueState(stream_free_s, demanded_bytes, backlog_bytes, frozenset(unstarted), left)

    @property
    def pending_bytes(self) -> int:
        """Bytes issued for transfers that have not ended."""
        return sum(t.issued_bytes for t in self._transfers.values())

    def apply(self, order: Order, now_s: float) -> TransferEnded | None:
        """Carry out one order; a cancel that takes effect at once returns the ended transfer.

        Submitting an expert that is queued already promotes it, and takes a cancel back.
        """
        if isinstance(order, Submit):
            known = self._transfers.get(order.expert)
            if known is not None:
                known.demanded |= order.cause is Cause.DEMAND
                known.cancelled = False
                return None
            demanded = order.cause is Cause.DEMAND
            self._transfers[order.expert] = _Transfer(order, now_s, demanded)
            return None
        if isinstance(order, Hold):
            self._held = order.on
            self._resumed_s = now_s
            return None
        transfer = self._transfers.get(order.expert)
        if transfer is None:
            return None
        if isinstance(order, Promote):
            if not transfer.demanded:
                transfer.submitted_s = max(transfer.submitted_s, now_s)
            transfer.demanded = True
            transfer.cancelled = False
            return None
        transfer.cancelled = True
        return self._ended(transfer, now_s)

    def await_bytes(self, expert: ExpertId) -> None:
        """Issue nothing of a transfer until `bytes_came`: RAM may not hold its expert."""
        self._transfers[expert].in_ram = False

    def bytes_came(self, expert: ExpertId, at_s: float) -> None:
        """Let a transfer begin: RAM holds its expert until the transfer ends."""
        transfer = self._transfers[expert]
        transfer.in_ram = True
        transfer.bytes_s = at_s

    def bytes_failed(self, expert: ExpertId, at_s: float) -> TransferEnded:
        """Give a transfer up that waits for bytes which cannot be read."""
        transfer = self._transfers[expert]
        transfer.failed = True
        ended = self._ended(transfer, at_s)
        assert ended is not None, f"{expert} is on the link without its bytes"
        return ended

    def next_chunk(self) -> Chunk | None:
        """Issue the most urgent chunk, or return None if nothing may be issued now."""
        if self._in_flight >= CHUNKS_IN_FLIGHT:
            return None
        transfer = self._most_urgent()
        if transfer is None:
            return None
        if not transfer.demanded and (self._held or self._in_flight >= PREFETCHES_IN_FLIGHT):
            return None
        offset = transfer.issued_bytes
        size = min(self._chunk_bytes, transfer.order.size_bytes - offset)
        transfer.issued_bytes += size
        transfer.in_flight += 1
        self._in_flight += 1
        self.issued_bytes += size
        return Chunk(
            transfer.order.expert,
            transfer.order.slot,
            offset,
            size,
            max(
                transfer.submitted_s,
                transfer.bytes_s,
                0.0 if transfer.demanded else self._resumed_s,
            ),
            first=offset == 0,
            last=transfer.issued_bytes == transfer.order.size_bytes,
        )

    def _most_urgent(self) -> _Transfer | None:
        """Return the oldest demand that RAM holds, else the prefetch with the earliest deadline."""
        found = None
        for transfer in self._transfers.values():  # oldest first
            if transfer.issued_bytes == transfer.order.size_bytes:
                continue
            if transfer.cancelled or transfer.failed or not transfer.in_ram:
                continue
            if transfer.demanded:
                return transfer
            if found is None or transfer.order.deadline_s < found.order.deadline_s:
                found = transfer
        return found

    def landed(self, chunk: Chunk, at_s: float) -> TransferEnded | None:
        """Note that a chunk arrived; return its transfer if that ends it."""
        return self._chunk_done(chunk, at_s, failed=False)

    def failed(self, chunk: Chunk, at_s: float) -> TransferEnded | None:
        """Note that a chunk's copy failed; the rest of its transfer is given up."""
        return self._chunk_done(chunk, at_s, failed=True)

    def _chunk_done(self, chunk: Chunk, at_s: float, failed: bool) -> TransferEnded | None:
        transfer = self._transfers[chunk.expert]
        transfer.in_flight -= 1
        self._in_flight -= 1
        transfer.failed |= failed
        return self._ended(transfer, at_s)

    def _ended(self, transfer: _Transfer, at_s: float) -> TransferEnded | None:
        if transfer.in_flight:
            return None
        if transfer.failed:
            outcome = Outcome.FAILED
        elif transfer.issued_bytes == transfer.order.size_bytes:
            outcome = Outcome.LANDED
        elif transfer.cancelled:
            outcome = Outcome.CANCELLED
        else:
            return None
        order = transfer.order
        del self._transfers[order.expert]
        return TransferEnded(
            order.expert, order.slot, outcome, transfer.issued_bytes, at_s, transfer.bytes_s
        )
