"""The way of an expert's bytes from disk over RAM to the link: the transfer queue and the RAM tier.

Pure. Both drivers, for real and for virtual time, go through it, so that both decide the same.
A transfer whose expert RAM does not hold waits for its read; others overtake it.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.core import ExpertId
from runtime.errors import PreScopeError
from runtime.ram_tier import RamTier, Read, Reader
from runtime.transfer_queue import (
    Cancel,
    Cause,
    Chunk,
    Order,
    Outcome,
    Promote,
    Submit,
    TransferEnded,
    TransferQueue,
)


class Supply:
    """The queue, and the tier it is fed from; without a tier everything is in RAM."""

    def __init__(self, queue: TransferQueue, tier: RamTier | None) -> None:
        self.queue = queue
        self.tier = tier
        self._failures: dict[ExpertId, PreScopeError] = {}

    def apply(self, order: Order, now_s: float) -> TransferEnded | None:
        """Carry out one order; return the transfer that ended at once, if one did."""
        tier = self.tier
        if tier is None:
            return self.queue.apply(order, now_s)
        if isinstance(order, Submit):
            fresh = order.expert not in self.queue
            self.queue.apply(order, now_s)
            demanded = order.cause is Cause.DEMAND
            if fresh:
                tier.submitted(order.slot)
                self.queue.await_bytes(order.expert)
                want = (Reader.LINK, order.expert)
                tier.want(want, demanded=demanded, deadline_s=order.deadline_s)
            elif demanded:
                tier.urge((Reader.LINK, order.expert))
            return None
        if isinstance(order, Promote):
            tier.urge((Reader.LINK, order.expert))
        ended = self.queue.apply(order, now_s)
        if isinstance(order, Cancel) and ended is not None:
            tier.let_go((Reader.LINK, order.expert))
        return ended

    def chunk_done(self, chunk: Chunk, at_s: float, *, failed: bool) -> TransferEnded | None:
        """Note that a chunk landed or failed; return its transfer if that ends it."""
        ended = (self.queue.failed if failed else self.queue.landed)(chunk, at_s)
        if ended is not None and self.tier is not None:
            self.tier.let_go((Reader.LINK, ended.expert))
            if ended.outcome is Outcome.LANDED:
                self.tier.arrived(ended.expert, ended.slot)
        return ended

    def reads(self, now_s: float) -> list[Read]:
        """Let the link have what is in RAM for it; return the reads that begin now."""
        if self.tier is None:
            return []
        granted, reads = self.tier.next(now_s)
        for reader, expert in granted:
            if reader is Reader.LINK:
                self.queue.bytes_came(expert, now_s)
        return reads

    def read_done(self, read: Read) -> None:
        """Note that a read landed; `reads` grants it."""
        assert self.tier is not None
        self.tier.landed(read)

    def read_failed(self, read: Read, at_s: float, error: PreScopeError) -> list[TransferEnded]:
        """Note that a read failed: transfers end with it, and the CPU hears of it in `held`."""
        assert self.tier is not None
        ended = []
        for reader, expert in self.tier.failed(read):
            if reader is Reader.CPU:
                self._failures[expert] = error
            else:
                ended.append(self.queue.bytes_failed(expert, at_s))
        return ended

    def ask(self, experts: Sequence[ExpertId]) -> None:
        """Ask for experts that the CPU will compute, all at once."""
        if self.tier is not None:
            for expert in experts:
                self.tier.want((Reader.CPU, expert), demanded=True)

    def held(self, experts: Sequence[ExpertId]) -> list[ExpertId]:
        """Return which of `experts` the CPU may read now; empty while it has to wait.

        Raises:
            ModelFilesError: one of them could not be read.
        """
        if self.tier is None:
            return list(experts)
        failed = [expert for expert in experts if expert in self._failures]
        if failed:
            raise self._failures.pop(failed[0])
        return [expert for expert in experts if self.tier.holds((Reader.CPU, expert))]

    def let_go(self, experts: Sequence[ExpertId]) -> None:
        """The CPU has computed these."""
        if self.tier is not None:
            for expert in experts:
                self.tier.let_go((Reader.CPU, expert))

    def abandon(self) -> None:
        """Nobody waits any more for what the CPU was to compute."""
        self._failures.clear()
        if self.tier is not None:
            self.tier.let_go_all(Reader.CPU)
