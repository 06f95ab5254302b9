"""Where each missing expert of a layer is served: over the link or on the CPU.

Pure functions of what is resident, how many tokens each expert has, and what the machine's rails
cost. The plan never changes which experts are computed, only when and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.core import HardwareProfile, PolicyName


@dataclass(frozen=True)
class Miss:
    """An expert of this layer that no slot holds, and how many tokens were routed to it."""

    expert: int
    tokens: int


@dataclass(frozen=True)
class MissPlan:
    """Which misses go over the link, most urgent first, and which are computed on the CPU."""

    load: tuple[int, ...]
    cpu: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Seconds on each rail for one machine, taken from its profile."""

    link_bytes_per_s: float
    link_call_s: float
    cpu_bytes_per_s: float
    cpu_bytes_per_s_while_copying: float
    cpu_call_s: float
    cpu_tokens_per_pass: float

    @classmethod
    def of(cls, profile: HardwareProfile) -> Costs:
        return cls(
            profile.link_bytes_per_s.value,
            profile.link_call_s.value,
            profile.cpu_expert_bytes_per_s.value,
            profile.cpu_expert_bytes_per_s_while_copying.value,
            profile.cpu_call_s.value,
            profile.cpu_tokens_per_pass.value,
        )

    def link_s(self, size_bytes: int) -> float:
        """Seconds for one expert over the link."""
        return self.link_call_s + size_bytes / self.link_bytes_per_s

    def cpu_work_bytes(self, size_bytes: int, tokens: int) -> float:
        """Bytes of weight reading that computing `tokens` rows on the CPU costs as much as."""
        return size_bytes * (1 + (tokens - 1) / self.cpu_tokens_per_pass)


def plan_misses(
    policy: PolicyName,
    misses: Sequence[Miss],
    size_bytes: int,
    costs: Costs,
    backlog_bytes: int,
    free_slot: bool,
) -> MissPlan:
    """Serve `misses` as `policy` does; `backlog_bytes` are ahead of them on the link.

    `cpu-miss` fills free slots first and then leaves the cache alone, so that what is resident
    stays: the static placement of engines that run every miss on the CPU.
    """
    everyone = tuple(miss.expert for miss in misses)
    if policy == "on-demand" or (policy == "cpu-miss" and free_slot):
        return MissPlan(everyone, ())
    if policy == "hybrid":
        return split_least_makespan(misses, size_bytes, costs, backlog_bytes)
    return MissPlan((), everyone)


def split_least_makespan(
    misses: Sequence[Miss], size_bytes: int, costs: Costs, backlog_bytes: int
) -> MissPlan:
    """Split misses between link and CPU so that the later of the two ends soonest.

    Experts with many tokens go over the link, where tokens are cheap; ties go to the CPU, which
    needs no slot. While anything is copied the CPU runs at its slower shared rate.
    After the latency-aware split of reactive hybrid engines: minimise the larger of
    `link constant + f S / link` and `cpu constant + (n - f) S / cpu`, constants included.
    """
    by_tokens = sorted(misses, key=lambda miss: (-miss.tokens, miss.expert))
    work = [costs.cpu_work_bytes(size_bytes, miss.tokens) for miss in by_tokens]
    left_bytes = sum(work)
    best, best_s = 0, float("inf")
    for fetched in range(len(by_tokens) + 1):
        link_s = 0.0
        if fetched:
            queued_s = backlog_bytes / costs.link_bytes_per_s
            link_s = queued_s + fetched * costs.link_s(size_bytes)
        cpu_s = 0.0
        if fetched < len(by_tokens):
            shared_bytes = min(left_bytes, link_s * costs.cpu_bytes_per_s_while_copying)
            cpu_s = costs.cpu_call_s + shared_bytes / costs.cpu_bytes_per_s_while_copying
            cpu_s += (left_bytes - shared_bytes) / costs.cpu_bytes_per_s
        if max(link_s, cpu_s) < best_s:
            best, best_s = fetched, max(link_s, cpu_s)
        if fetched < len(by_tokens):
            left_bytes -= work[fetched]
    load = tuple(miss.expert for miss in by_tokens[:best])
    return MissPlan(load, tuple(miss.expert for miss in by_tokens[best:]))
