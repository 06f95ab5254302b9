"""Counters that the hot loop adds to, in units that close.

`Counters` is owned by the engine thread; readers take copies. Bytes over the link close at every
moment: issued = on demand + prefetch used + late + wasted + cancelled + failed + pending.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass
class Counters:
    """What happened since the engine started. Expert uses count one per (layer, expert, pass)."""

    routed: int = 0
    served_resident: int = 0
    served_prefetch_in_time: int = 0
    served_prefetch_late: int = 0
    served_on_demand: int = 0
    served_cpu: int = 0
    link_bytes_issued: int = 0
    link_bytes_on_demand: int = 0
    link_bytes_prefetch_used: int = 0
    link_bytes_prefetch_late: int = 0
    link_bytes_prefetch_wasted: int = 0
    link_bytes_cancelled: int = 0
    link_bytes_failed: int = 0
    link_bytes_pending: int = 0
    copies_failed: int = 0
    evictions: int = 0
    forward_passes: int = 0
    stall_s: float = 0.0
    cpu_expert_s: float = 0.0
    link_busy_s: float = 0.0

    def copy(self) -> Counters:
        """Return a snapshot that later additions do not change."""
        return replace(self)

    def since(self, earlier: Counters) -> Counters:
        """Return what was added after `earlier` was copied."""
        return Counters(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(Counters)}
        )

    @property
    def served(self) -> tuple[int, int, int, int, int]:
        """Expert uses by origin, in the order of `core.SERVED`; they add up to `routed`."""
        return (
            self.served_resident,
            self.served_prefetch_in_time,
            self.served_prefetch_late,
            self.served_on_demand,
            self.served_cpu,
        )

    @property
    def hit_rate(self) -> float:
        """Share of expert uses that found their expert in a slot; 0 before the first use."""
        if self.routed == 0:
            return 0.0
        return (self.served_resident + self.served_prefetch_in_time) / self.routed
