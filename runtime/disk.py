"""Reading experts from disk into their places in RAM, as the transfer drivers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.core import ExpertId
from runtime.device import Device
from runtime.errors import PreScopeError
from runtime.ram_tier import RamTier, Read


@dataclass(frozen=True)
class Disk:
    """The tier of experts in RAM and what fills it: `fill` reads one expert into its place.

    `fill` is called by several threads at once, for different places, and raises a
    `PreScopeError` where the expert cannot be read.
    """

    tier: RamTier
    fill: Callable[[ExpertId, int], None]

    def read(self, device: Device, read: Read) -> tuple[float, PreScopeError | None]:
        """Read one expert; return when it was there, on the device's clock, and why it is not."""
        failures: list[PreScopeError] = []

        def work() -> None:
            try:
                self.fill(read.expert, read.place)
            except PreScopeError as error:
                failures.append(error)

        at_s = device.read(read.size_bytes, read.ordered_s, work)
        return at_s, failures[0] if failures else None
