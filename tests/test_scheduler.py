"""The split between link and CPU: optimal among all prefixes, and sane at its edges."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from runtime.scheduler import Costs, Miss, MissPlan, plan_misses, split_least_makespan

SIZE = 100_000
costs_of_machines = st.builds(
    Costs,
    link_bytes_per_s=st.floats(1e6, 1e11),
    link_call_s=st.floats(0, 1e-3),
    cpu_bytes_per_s=st.floats(1e6, 1e11),
    cpu_bytes_per_s_while_copying=st.floats(1e6, 1e11),
    cpu_call_s=st.floats(0, 1e-3),
    cpu_tokens_per_pass=st.floats(1, 100),
).filter(lambda costs: costs.cpu_bytes_per_s >= costs.cpu_bytes_per_s_while_copying)
misses_of_a_layer = st.lists(st.integers(1, 64), min_size=1, max_size=7).map(
    lambda tokens: [Miss(expert, count) for expert, count in enumerate(tokens)]
)


def makespan_s(load: set[int], misses: list[Miss], costs: Costs, backlog_bytes: int) -> float:
    """The later of link and CPU, worked out apart from the code under test."""
    link_s = 0.0
    if load:
        each_s = costs.link_call_s + SIZE / costs.link_bytes_per_s
        link_s = backlog_bytes / costs.link_bytes_per_s + len(load) * each_s
    work = sum(
        SIZE * (1 + (m.tokens - 1) / costs.cpu_tokens_per_pass)
        for m in misses
        if m.expert not in load
    )
    if not work:
        return link_s
    done_while_copying = link_s * costs.cpu_bytes_per_s_while_copying
    if done_while_copying >= work:
        return max(link_s, costs.cpu_call_s + work / costs.cpu_bytes_per_s_while_copying)
    alone_s = (work - done_while_copying) / costs.cpu_bytes_per_s
    return max(link_s, costs.cpu_call_s + link_s + alone_s)


@given(misses_of_a_layer, costs_of_machines, st.integers(0, 1_000_000))
def test_no_other_choice_ends_sooner(misses: list[Miss], costs: Costs, backlog_bytes: int) -> None:
    plan = split_least_makespan(misses, SIZE, costs, backlog_bytes)
    assert sorted(plan.load + plan.cpu) == [miss.expert for miss in misses]
    chosen_s = makespan_s(set(plan.load), misses, costs, backlog_bytes)
    everyone = [miss.expert for miss in misses]
    for count in range(len(everyone) + 1):
        for load in combinations(everyone, count):
            assert chosen_s <= makespan_s(set(load), misses, costs, backlog_bytes) * (1 + 1e-9)


def desktop(link: float, cpu: float) -> Costs:
    return Costs(link, 48e-6, cpu, cpu * 0.75, 20e-6, 16)


def test_a_single_miss_goes_to_a_cpu_that_is_faster_than_the_link() -> None:
    plan = split_least_makespan([Miss(3, 1)], SIZE, desktop(25e9, 55e9), 0)
    assert plan == MissPlan((), (3,))


def test_a_single_miss_goes_over_a_link_that_is_faster_than_the_cpu() -> None:
    plan = split_least_makespan([Miss(3, 1)], 10 * SIZE, desktop(55e9, 15e9), 0)
    assert plan == MissPlan((3,), ())


def test_experts_with_many_tokens_go_over_the_link() -> None:
    misses = [Miss(0, 1), Miss(1, 200), Miss(2, 1), Miss(3, 1)]
    plan = split_least_makespan(misses, 10 * SIZE, desktop(25e9, 55e9), 0)
    assert plan.load == (1,)


def test_a_full_link_leaves_the_work_to_the_cpu() -> None:
    misses = [Miss(expert, 1) for expert in range(4)]
    size_bytes = 50 * SIZE
    idle = split_least_makespan(misses, size_bytes, desktop(25e9, 55e9), 0)
    busy = split_least_makespan(misses, size_bytes, desktop(25e9, 55e9), 100 * size_bytes)
    assert idle.load
    assert not busy.load


def test_each_policy_serves_misses_its_own_way() -> None:
    misses = [Miss(expert, 1) for expert in range(3)]
    costs = desktop(25e9, 55e9)
    everyone = (0, 1, 2)
    assert plan_misses("on-demand", misses, SIZE, costs, 0, False) == MissPlan(everyone, ())
    assert plan_misses("cpu-only", misses, SIZE, costs, 0, True) == MissPlan((), everyone)
    assert plan_misses("cpu-miss", misses, SIZE, costs, 0, False) == MissPlan((), everyone)
    assert plan_misses("cpu-miss", misses, SIZE, costs, 0, True) == MissPlan(everyone, ())
