"""Keeps the experts in RAM out of the way of other programs, at token boundaries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from runtime.ram_tier_pressure import RamPressure

LOOK_EVERY_S = 1.0
WATCHED_FROM_BYTES = 2**30
"""Experts that take less than this are no relief to anybody."""

log = logging.getLogger("prescope.ram")


class ResizableRam(Protocol):
    """What is asked of the executor: how many experts RAM holds, and to change that."""

    @property
    def ram_experts(self) -> int: ...

    def resize_ram(self, experts: int) -> int: ...


class RamWatch:
    """Looks once a second at most; the engine thread calls it between two forward passes.

    `free_bytes` says what is available to this process now. A system that cannot tell says 0 and
    is left alone.
    """

    def __init__(
        self,
        executor: ResizableRam,
        pressure: RamPressure,
        free_bytes: Callable[[], int],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._pressure = pressure
        self._free_bytes = free_bytes
        self._now_s = now_s
        self._due_s = 0.0

    def __call__(self) -> None:
        now_s = self._now_s()
        if now_s < self._due_s:
            return
        self._due_s = now_s + LOOK_EVERY_S
        free_bytes = self._free_bytes()
        if free_bytes <= 0:
            return
        held = self._executor.ram_experts
        wanted = self._pressure.experts(now_s, free_bytes, held)
        if wanted != held:
            now_held = self._executor.resize_ram(wanted)
            log.info(
                "%.2f GiB of RAM are free: %d experts stay there instead of %d",
                free_bytes / 2**30,
                now_held,
                held,
            )
