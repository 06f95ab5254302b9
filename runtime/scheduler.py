"""Where each missing expert of a layer is served: over the link or on the CPU.

Pure functions of what is missing, how many tokens each expert has, and what the machine's rails
cost. The plan never changes which experts are computed, only when and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled
from runtime.core import HardwareProfile

Experts = NDArray[np.int64]
Floats = NDArray[np.float64]


FEW = 16
"""Up to so many experts are put in order one by one, more by a sort."""


class MissPlan(NamedTuple):
    """Which misses go over the link, most urgent first, and which are computed on the CPU.

    `along` are experts that nobody asked for and that come over the link before the layer is done
    all the same: what engines that move whole layers do. With `hold` no prefetch is issued until
    the layer is done.
    """

    load: tuple[int, ...]
    cpu: tuple[int, ...]
    along: tuple[int, ...] = ()
    hold: bool = False


@dataclass(frozen=True)
class Costs:
    """Seconds on each rail for one machine, taken from its profile.

    `gap_s` is the time from the end of one layer to the routing of the next for one token, while
    the link has nothing to do unless something is copied ahead.
    """

    link_bytes_per_s: float
    link_call_s: float
    cpu_bytes_per_s: float
    cpu_bytes_per_s_while_copying: float
    cpu_call_s: float
    cpu_tokens_per_pass: float
    device_bytes_per_s: float
    device_tokens_per_pass: float
    host_layer_s: float
    device_layer_s: float
    disk_bytes_per_s: float = 2e9
    disk_call_s: float = 1e-4

    @classmethod
    def of(cls, profile: HardwareProfile) -> Costs:
        return cls(
            profile.link_bytes_per_s.value,
            profile.link_call_s.value,
            profile.cpu_expert_bytes_per_s.value,
            profile.cpu_expert_bytes_per_s_while_copying.value,
            profile.cpu_call_s.value,
            profile.cpu_tokens_per_pass.value,
            profile.device_bytes_per_s.value,
            profile.device_tokens_per_pass.value,
            profile.host_layer_s.value,
            profile.device_layer_s.value,
            profile.disk_bytes_per_s.value,
            profile.disk_call_s.value,
        )

    @cached_property
    def rails(self) -> tuple[float, ...]:
        """What `split_least_makespan` goes by, in the order in which it takes it."""
        return (
            float(self.link_bytes_per_s),
            float(self.link_call_s),
            float(self.cpu_bytes_per_s),
            float(self.cpu_bytes_per_s_while_copying),
            float(self.cpu_call_s),
            float(self.cpu_tokens_per_pass),
            float(self.device_bytes_per_s),
            float(self.device_tokens_per_pass),
        )

    @cached_property
    def slower_beside_copies(self) -> float:
        """The share of its rate that the CPU loses while the link copies."""
        return 1.0 - self.cpu_bytes_per_s_while_copying / self.cpu_bytes_per_s

    def scaled(self, link: float, cpu: float) -> Costs:
        """Return these costs with the rails slower by these factors."""
        return replace(
            self,
            link_bytes_per_s=self.link_bytes_per_s / link,
            link_call_s=self.link_call_s * link,
            cpu_bytes_per_s=self.cpu_bytes_per_s / cpu,
            cpu_bytes_per_s_while_copying=self.cpu_bytes_per_s_while_copying / cpu,
            cpu_call_s=self.cpu_call_s * cpu,
        )

    def without_constants(self) -> Costs:
        """Return the rates alone, for those who want to know what the constants are worth."""
        return replace(self, link_call_s=0.0, cpu_call_s=0.0)

    def link_s(self, size_bytes: int, copies: int = 1, ahead_s: float = 0.0) -> float:
        """Seconds until so many experts are over a link that is taken for `ahead_s`.

        The constant is paid once: later copies are called while earlier ones move.
        """
        return max(ahead_s, self.link_call_s) + copies * size_bytes / self.link_bytes_per_s

    def cpu_work_bytes(self, size_bytes: int, tokens: int) -> float:
        """Bytes of weight reading that computing `tokens` rows on the CPU costs as much as."""
        return size_bytes * (1 + (tokens - 1) / self.cpu_tokens_per_pass)

    def device_s(self, size_bytes: int, tokens: int) -> float:
        """Seconds for one expert on the device."""
        factor = 1 + (tokens - 1) / self.device_tokens_per_pass
        return size_bytes / self.device_bytes_per_s * factor

    def dense_s(self, tokens: int) -> float:
        """Seconds of a layer's dense work on the device."""
        return self.device_layer_s * (1 + (tokens - 1) / self.device_tokens_per_pass)


class Split(NamedTuple):
    """How misses are split: in the order of `experts` the first `fetched` go over the link, the
    others to the CPU, whose work costs as much as reading `cpu_bytes`."""

    experts: tuple[int, ...]
    fetched: int
    cpu_bytes: float

    @property
    def plan(self) -> MissPlan:
        return MissPlan(self.experts[: self.fetched], self.experts[self.fetched :])


def split_least_makespan(
    misses: Sequence[int] | Experts,
    tokens: Sequence[int],
    size_bytes: int,
    costs: Costs,
    ahead_s: float = 0.0,
    busy_s: float = 0.0,
    worth: Sequence[float] | Floats | None = None,
    bonus_s: float = 0.0,
    *,
    landing: bool = False,
) -> Split:
    """Split misses between link and CPU so that the later of the two ends soonest.

    `tokens` is how many each miss has. `ahead_s` is how long the link is taken already, `busy_s`
    how long the layer lasts anyway. With `landing` the device's time for fetched experts counts
    too: it begins when the host is back from the CPU's work, the last one not before it landed.
    Experts with many tokens go over the link, where tokens are cheap, then those with more
    `worth` in the cache; ties go to the CPU, which needs no slot. While anything is copied the
    CPU runs at its slower shared rate. A fetched expert stays in a slot: `bonus_s` is what each
    unit of its worth brings later. After the latency-aware split of reactive hybrid engines:
    minimise the larger of `link constant + f S / link` and `cpu constant + (n - f) S / cpu`.
    """
    experts, counts = np.array(misses, np.int64), np.array(tokens, np.float64)
    values = np.zeros(len(experts)) if worth is None else np.array(worth, np.float64)
    if len(experts) > FEW:
        order = np.lexsort((experts, -values, -counts))
        experts, counts, values = experts[order], counts[order], values[order]
    times_s = (float(ahead_s), float(busy_s), float(bonus_s))
    fetched, cpu_bytes = _least_makespan(
        experts, counts, values, float(size_bytes), *times_s, landing, *costs.rails
    )
    return Split(tuple(experts.tolist()), fetched, cpu_bytes)


@compiled
def _least_makespan(
    experts: Experts,
    tokens: Floats,
    worth: Floats,
    size_bytes: float,
    ahead_s: float,
    busy_s: float,
    bonus_s_of_worth: float,
    landing: bool,
    link_bytes_per_s: float,
    link_call_s: float,
    cpu_bytes_per_s: float,
    cpu_bytes_per_s_while_copying: float,
    cpu_call_s: float,
    cpu_tokens_per_pass: float,
    device_bytes_per_s: float,
    device_tokens_per_pass: float,
) -> tuple[int, float]:
    """Put the experts in order; return how many of the first go over the link, and the CPU's work
    for the others in bytes. Many are in order already."""
    count = len(experts)
    for place in range(1, count):
        at = place
        while at > 0:
            before = at - 1
            if tokens[before] != tokens[at]:
                later = tokens[before] < tokens[at]
            elif worth[before] != worth[at]:
                later = worth[before] < worth[at]
            else:
                later = experts[before] > experts[at]
            if not later:
                break
            experts[before], experts[at] = experts[at], experts[before]
            tokens[before], tokens[at] = tokens[at], tokens[before]
            worth[before], worth[at] = worth[at], worth[before]
            at = before
    per_token = size_bytes / cpu_tokens_per_pass
    base = size_bytes - per_token
    left_bytes = left_bonus_s = 0.0
    for place in range(count):
        left_bytes += base + per_token * tokens[place]
        left_bonus_s += max(0.0, worth[place]) * bonus_s_of_worth
    bonus_s = device_s = last_s = 0.0
    slow, fast = cpu_bytes_per_s_while_copying, cpu_bytes_per_s
    best, best_s, copying_from_s = 0, np.inf, max(ahead_s, link_call_s)
    for fetched in range(count + 1):
        link_s = copying_from_s + fetched * size_bytes / link_bytes_per_s if fetched else 0.0
        cpu_s = 0.0
        if fetched < count:
            shared_bytes = min(left_bytes, (link_s if fetched else ahead_s) * slow)
            cpu_s = cpu_call_s + shared_bytes / slow + (left_bytes - shared_bytes) / fast
        total_s = max(link_s + last_s, max(cpu_s, busy_s) + device_s) - bonus_s
        if total_s < best_s:
            best, best_s = fetched, total_s
        if fetched < count:
            left_bytes -= base + per_token * tokens[fetched]
            if landing:
                last_s = size_bytes / device_bytes_per_s
                last_s *= 1 + (tokens[fetched] - 1) / device_tokens_per_pass
                device_s += last_s
            more_s = max(0.0, worth[fetched]) * bonus_s_of_worth
            bonus_s += more_s
            left_bonus_s -= more_s
        if link_s - bonus_s - left_bonus_s >= best_s:
            break  # more copies only make it later
    cpu_bytes = 0.0
    for place in range(best, count):
        cpu_bytes += size_bytes * (1 + (tokens[place] - 1) / cpu_tokens_per_pass)
    return best, cpu_bytes


def split_by_share(misses: Sequence[int], costs: Costs, worth: Sequence[float] = ()) -> MissPlan:
    """Split misses by the rails' rates alone, as FreeToken does (arXiv 2608.16157).

    The fetched number is the integer beside share x misses with the smaller
    max(F (1 - share), (M - F) share), share being the link's part of the two rates while both
    run. No constants, no tokens.
    """
    values = worth if len(worth) else (0.0,) * len(misses)
    experts = tuple(e for _, e in sorted(zip((-v for v in values), misses, strict=True)))
    both = costs.link_bytes_per_s + costs.cpu_bytes_per_s_while_copying
    share = costs.link_bytes_per_s / both
    count = len(experts)
    low = min(count, int(share * count))

    def cost(fetched: int) -> float:
        return max(fetched * (1 - share), (count - fetched) * share)

    fetched = min((low, min(count, low + 1)), key=cost)
    return MissPlan(experts[:fetched], experts[fetched:])
