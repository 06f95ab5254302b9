"""When the next layers will be routed and when the CPU works until then: what copies must fit in.

Pure arithmetic on seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHARE = 0.05


@dataclass
class Averages:
    """Moving averages over layers: how long one is served, its CPU work, and its misses."""

    layer_s: float = 0.0
    cpu_s: float = 0.0
    misses: float = 1.0
    demanded_s: float = 0.0
    period_s: float = 0.0
    ended_s: float | None = None

    @property
    def link_share(self) -> float:
        """Share of the time that the link moves what somebody waits for."""
        return self.demanded_s / self.period_s if self.period_s > 0.0 else 0.0

    def add(self, now_s: float, routed_s: float, cpu_s: float, moved_s: float, misses: int) -> None:
        """Note a layer that is done: when it was routed, and its seconds on CPU and link."""
        first = self.ended_s is None
        share = 1.0 if first else SHARE
        self.layer_s += share * (now_s - routed_s - self.layer_s)
        self.cpu_s += share * (cpu_s - self.cpu_s)
        self.misses += share * (misses - self.misses)
        self.demanded_s += share * (moved_s - self.demanded_s)
        if self.ended_s is not None:
            self.period_s += share * (now_s - self.ended_s - self.period_s)
        self.ended_s = now_s


class Turnover:
    """How long a slot keeps what it got, in passes: slots over admissions per pass."""

    def __init__(self, slots: int, longest_passes: float) -> None:
        self.admitted = 0
        self._slots = slots
        self._longest_passes = longest_passes
        self._per_pass = slots / longest_passes

    @property
    def stay_passes(self) -> float:
        return min(self._longest_passes, self._slots / max(self._per_pass, 1e-9))

    def end_pass(self) -> None:
        self._per_pass += SHARE * (self.admitted - self._per_pass)
        self.admitted = 0


class Window(NamedTuple):
    """From now to the routing of the layer after next.

    The CPU computes experts until `cpu_until_s`, and again from `next_s`, when the next layer is
    routed, until `next_cpu_until_s`; the layer after it is routed at `second_s`. From `next_s`
    until `next_link_until_s` the link moves what the next layer demands.
    """

    now_s: float
    cpu_until_s: float
    next_s: float
    next_cpu_until_s: float
    next_link_until_s: float
    second_s: float

    def lands_s(self, begin_s: float, copy_s: float) -> float:
        """Return when a copy lands that lets the next layer's demands go first."""
        before_s = max(0.0, min(copy_s, self.next_s - begin_s))
        if before_s == copy_s:
            return begin_s + copy_s
        return max(begin_s, self.next_link_until_s) + copy_s - before_s

    def beside_cpu_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of a copy from `begin_s` to `end_s` during which the CPU works as well."""
        now = min(end_s, self.cpu_until_s) - max(begin_s, self.now_s)
        later = min(end_s, self.next_cpu_until_s) - max(begin_s, self.next_s)
        return max(0.0, now) + max(0.0, later)

    def lands_held_s(self, begin_s: float, copy_s: float) -> float:
        """Return when a copy lands that pauses while the CPU works."""
        at_s = max(begin_s, self.cpu_until_s)
        if at_s < self.next_s:
            if at_s + copy_s <= self.next_s:
                return at_s + copy_s
            copy_s -= self.next_s - at_s
            at_s = self.next_s
        return max(at_s, self.next_cpu_until_s) + copy_s
