"""The split between link and CPU: optimal among all prefixes, and sane at its edges."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from runtime import scheduler
from runtime.scheduler import Costs, MissPlan, split_by_share

SIZE = 100_000


class Miss(NamedTuple):
    expert: int
    tokens: int


def least_makespan(
    misses: list[Miss], size: int, costs: Costs, *busy: float, **more: Any
) -> MissPlan:
    experts, tokens = zip(*misses, strict=True)
    return scheduler.split_least_makespan(experts, tokens, size, costs, *busy, **more).plan


costs_of_machines = st.builds(
    Costs,
    link_bytes_per_s=st.floats(1e6, 1e11),
    link_call_s=st.floats(0, 1e-3),
    cpu_bytes_per_s=st.floats(1e6, 1e11),
    cpu_bytes_per_s_while_copying=st.floats(1e6, 1e11),
    cpu_call_s=st.floats(0, 1e-3),
    cpu_tokens_per_pass=st.floats(1, 100),
    device_bytes_per_s=st.just(1e12),
    device_tokens_per_pass=st.just(256.0),
    host_layer_s=st.just(1e-4),
    device_layer_s=st.just(1e-4),
).filter(lambda costs: costs.cpu_bytes_per_s >= costs.cpu_bytes_per_s_while_copying)
misses_of_a_layer = st.lists(st.integers(1, 64), min_size=1, max_size=7).map(
    lambda tokens: [Miss(expert, count) for expert, count in enumerate(tokens)]
)


def makespan_s(
    load: set[int], misses: list[Miss], costs: Costs, ahead_s: float, busy_s: float
) -> float:
    """The latest of link, CPU and device, worked out apart from the code under test."""
    copying_s = ahead_s
    if load:
        copying_s = max(ahead_s, costs.link_call_s) + len(load) * SIZE / costs.link_bytes_per_s
    link_s = copying_s if load else 0.0
    work = sum(
        SIZE * (1 + (m.tokens - 1) / costs.cpu_tokens_per_pass)
        for m in misses
        if m.expert not in load
    )
    if not work:
        return max(link_s, busy_s)
    done_while_copying = copying_s * costs.cpu_bytes_per_s_while_copying
    if done_while_copying >= work:
        cpu_s = work / costs.cpu_bytes_per_s_while_copying
    else:
        cpu_s = copying_s + (work - done_while_copying) / costs.cpu_bytes_per_s
    return max(link_s, costs.cpu_call_s + cpu_s, busy_s)


@given(misses_of_a_layer, costs_of_machines, st.floats(0, 0.1), st.floats(0, 0.1))
def test_no_other_choice_ends_sooner(
    misses: list[Miss], costs: Costs, ahead_s: float, busy_s: float
) -> None:
    plan = least_makespan(misses, SIZE, costs, ahead_s, busy_s)
    assert sorted(plan.load + plan.cpu) == [miss.expert for miss in misses]
    chosen_s = makespan_s(set(plan.load), misses, costs, ahead_s, busy_s)
    everyone = [miss.expert for miss in misses]
    for count in range(len(everyone) + 1):
        for load in combinations(everyone, count):
            assert chosen_s <= makespan_s(set(load), misses, costs, ahead_s, busy_s) * (1 + 1e-9)


def desktop(link: float, cpu: float) -> Costs:
    return Costs(link, 48e-6, cpu, cpu * 0.75, 20e-6, 16, 5e11, 256, 1e-4, 1e-4)


def test_a_single_miss_goes_to_a_cpu_that_is_faster_than_the_link() -> None:
    plan = least_makespan([Miss(3, 1)], SIZE, desktop(25e9, 55e9), 0)
    assert plan == MissPlan((), (3,))


def test_a_single_miss_goes_over_a_link_that_is_faster_than_the_cpu() -> None:
    plan = least_makespan([Miss(3, 1)], 10 * SIZE, desktop(55e9, 15e9), 0)
    assert plan == MissPlan((3,), ())


def test_experts_with_many_tokens_go_over_the_link() -> None:
    misses = [Miss(0, 1), Miss(1, 200), Miss(2, 1), Miss(3, 1)]
    plan = least_makespan(misses, 10 * SIZE, desktop(25e9, 55e9), 0)
    assert plan.load == (1,)


def test_a_full_link_leaves_the_work_to_the_cpu() -> None:
    misses = [Miss(expert, 1) for expert in range(4)]
    size_bytes = 50 * SIZE
    idle = least_makespan(misses, size_bytes, desktop(25e9, 55e9), 0)
    busy = least_makespan(misses, size_bytes, desktop(25e9, 55e9), 100 * size_bytes / 25e9)
    assert idle.load
    assert not busy.load


def test_among_equals_what_the_cache_wants_most_is_fetched() -> None:
    misses = [Miss(expert, 1) for expert in range(6)]
    plan = least_makespan(
        misses, 50 * SIZE, desktop(25e9, 25e9), worth=[float(number) for number in range(6)]
    )
    assert plan.load
    assert plan.load == tuple(sorted(plan.load, reverse=True))
    assert set(plan.load) == set(range(6 - len(plan.load), 6))


@given(st.integers(1, 12), st.floats(1e9, 1e11), st.floats(1e9, 1e11))
def test_the_share_rule_is_within_one_expert_of_the_rates(
    count: int, link: float, cpu: float
) -> None:
    misses = [Miss(expert, 1) for expert in range(count)]
    costs = desktop(link, cpu)
    share = link / (link + costs.cpu_bytes_per_s_while_copying)
    plan = split_by_share([miss.expert for miss in misses], costs)
    assert abs(len(plan.load) - share * count) < 1
    assert sorted(plan.load + plan.cpu) == list(range(count))
