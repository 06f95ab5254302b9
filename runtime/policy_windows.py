"""What is copied ahead: what fits before the next layers are routed and pays, CPU work minded.

Pure arithmetic on seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled

Floats = NDArray[np.float64]
Experts = NDArray[np.int64]
Flags = NDArray[np.bool_]

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


class Copies(NamedTuple):
    """What copies ahead into one layer cost and bring, in seconds.

    Each takes `copy_s` on the link. One miss less saves the layer `saved_s`; of what a guess
    promises the share `kept` comes true. Working beside a copy costs the CPU `beside_price` of
    that time. Copies are `held` while the CPU works, or go on; those for the `next` layer are
    waited for when it is routed, those for the one after it let its demands go first.
    """

    copy_s: float
    saved_s: float
    kept: float
    beside_price: float
    held: bool
    next: bool


class Worth(NamedTuple):
    """What slots are worth to a layer's experts: `uses` of each over the time a slot is kept,
    beyond those of its victim, as far as such estimates are to be trusted."""

    uses: Floats
    victim_uses: float
    trust: float


@compiled
def choose(
    experts: Experts,
    use: Floats,
    here: Flags,
    worth: Worth,
    at_s: float,
    window: Window,
    copies: Copies,
    chosen: Experts,
    hopes: Floats,
) -> tuple[int, float]:
    """Choose what to copy from `at_s` on, when the link is free, as long as each pays.

    Of the guesses, the likeliest first, those that are `here` are passed over. Places of those
    chosen go into `chosen`, and into `hopes` what each is to save in uses of that layer.

    Returns how many they are, and when the link is free again.
    """
    deadline_s = window.next_s if copies.next else window.second_s
    begins_s, lands_s, in_time, price_s = -1.0, 0.0, 0.0, 0.0
    count = 0
    for place in range(len(experts)):
        number = experts[place]
        if number < 0 or number >= len(worth.uses):
            continue  # a guess at random: there is no such expert
        if number < len(here) and here[number]:
            continue
        if at_s >= deadline_s:
            break
        if begins_s != at_s:
            begins_s = at_s
            if copies.held:
                lands_s = _lands_held_s(window, at_s, copies.copy_s)
            else:
                # A copy for the next layer goes on when that is routed: it is waited for.
                lands_s = at_s + copies.copy_s
                if not copies.next:
                    lands_s = _lands_s(window, at_s, copies.copy_s)
                price_s = copies.beside_price * _beside_cpu_s(window, at_s, lands_s)
            late_s = lands_s - deadline_s
            in_time = 1.0 if late_s <= 0.0 else max(0.0, 1.0 - late_s / copies.saved_s)
            if in_time == 0.0:
                break
        later = worth.trust * (worth.uses[number] - worth.victim_uses)
        if (use[place] * in_time * copies.kept + later) * copies.saved_s > price_s:
            chosen[count] = place
            hopes[count] = use[place] * in_time
            count += 1
            at_s = lands_s
    return count, at_s


@compiled
def _lands_s(window: Window, begin_s: float, copy_s: float) -> float:
    """Return when a copy lands that lets the next layer's demands go first."""
    before_s = max(0.0, min(copy_s, window.next_s - begin_s))
    if before_s == copy_s:
        return begin_s + copy_s
    return max(begin_s, window.next_link_until_s) + copy_s - before_s


@compiled
def _beside_cpu_s(window: Window, begin_s: float, end_s: float) -> float:
    """Seconds of a copy from `begin_s` to `end_s` during which the CPU works as well."""
    now_s = min(end_s, window.cpu_until_s) - max(begin_s, window.now_s)
    later_s = min(end_s, window.next_cpu_until_s) - max(begin_s, window.next_s)
    return max(0.0, now_s) + max(0.0, later_s)


@compiled
def _lands_held_s(window: Window, begin_s: float, copy_s: float) -> float:
    """Return when a copy lands that pauses while the CPU works."""
    at_s = max(begin_s, window.cpu_until_s)
    if at_s < window.next_s:
        if at_s + copy_s <= window.next_s:
            return at_s + copy_s
        copy_s -= window.next_s - at_s
        at_s = window.next_s
    return max(at_s, window.next_cpu_until_s) + copy_s
