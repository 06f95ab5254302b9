"""Snapshots: four a second, over the last second, in units that agree with the counters."""

from __future__ import annotations

import base64
import time

import pytest

from runtime.core import TelemetrySnapshot
from runtime.telemetry import Counters, Gauges, Panel, Timing, generation_stats


class Bench:
    """A panel over counters and clocks that the test turns by hand."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.wall_s = 100.0
        self.device_s = 7.0
        self.seen: list[TelemetrySnapshot] = []
        self.panel = Panel(
            self.gauges, self.seen.append, lambda: self.device_s, lambda: self.wall_s
        )

    def gauges(self) -> Gauges:
        return Gauges(
            emulated=True,
            device="card",
            model="m",
            policy="hybrid",
            counters=self.counters.copy(),
            heat=bytes([128, 1]),
            layers=1,
            experts=2,
            link_max_bytes_per_s=100.0,
            vram_used_bytes=1,
            vram_budget_bytes=2,
            ram_used_bytes=3,
            ram_total_bytes=4,
            cache_slots=5,
            cache_slots_used=5,
        )

    def begin(self) -> Timing:
        timing = Timing(self.device_s, self.counters.copy())
        self.panel.begin(timing)
        return timing

    def step(self, timing: Timing, seconds: float) -> None:
        """One token: 3 experts in slots, one loaded, 50 bytes over the link, half of it waited."""
        self.device_s += seconds
        self.wall_s += seconds
        self.counters.routed += 4
        self.counters.served_resident += 3
        self.counters.served_on_demand += 1
        self.counters.link_bytes_issued += 50
        self.counters.stall_s += seconds / 2
        timing.token(self.device_s)
        if timing.new_tokens == 1:
            timing.decode_counters = self.counters.copy()
        self.panel.tick()


def test_four_snapshots_a_second_however_often_it_ticks() -> None:
    bench = Bench()
    timing = bench.begin()
    for _ in range(1000):
        bench.step(timing, 0.01)
    assert 38 <= len(bench.seen) <= 42
    assert [s.sequence for s in bench.seen] == list(range(1, len(bench.seen) + 1))


def test_figures_of_a_steady_generation_are_exact() -> None:
    bench = Bench()
    timing = bench.begin()
    for _ in range(40):
        bench.step(timing, 0.125)
    last = bench.seen[-1]
    assert last.tokens_per_s == pytest.approx(8.0)
    assert last.ttft_s == pytest.approx(0.125)
    assert last.token_s == pytest.approx(0.125)
    assert last.stall_s_per_token == pytest.approx(0.0625)
    assert last.link_bytes_per_s == pytest.approx(400.0)
    assert last.hit_rate == 0.75
    assert last.served == (24, 0, 0, 8, 0)  # of the last second: 8 tokens
    assert last.link_bytes_total == bench.counters.link_bytes_issued
    assert base64.b64decode(last.heat) == bytes([128, 1])


def test_a_new_generation_forgets_the_rates_of_the_old_one() -> None:
    bench = Bench()
    timing = bench.begin()
    for _ in range(20):
        bench.step(timing, 0.1)
    bench.panel.end()
    assert not bench.seen[-1].generating
    assert bench.seen[-1].tokens_per_s == pytest.approx(10.0)
    bench.begin()
    fresh = bench.seen[-1]
    assert fresh.generating
    assert (fresh.tokens_per_s, fresh.ttft_s, fresh.served) == (0.0, 0.0, (0, 0, 0, 0, 0))


def test_before_any_generation_nothing_divides_by_zero() -> None:
    bench = Bench()
    bench.panel.refresh()
    assert bench.seen[0].hit_rate == 0.0
    assert generation_stats(bench.begin(), bench.gauges(), bench.device_s).link_bytes_per_s == 0.0


def test_statistics_count_only_their_own_generation() -> None:
    bench = Bench()
    earlier = bench.begin()
    for _ in range(3):
        bench.step(earlier, 1.0)
    timing = bench.begin()
    timing.prompt_tokens = 9
    for _ in range(5):
        bench.step(timing, 0.5)
    stats = generation_stats(timing, bench.gauges(), bench.device_s)
    assert (stats.prompt_tokens, stats.new_tokens, stats.routed) == (9, 5, 20)
    assert stats.served_resident + stats.served_on_demand == stats.routed
    assert stats.decode_tokens_per_s == pytest.approx(2.0)
    assert stats.link_bytes_per_s == pytest.approx(100.0)


def test_a_tick_costs_next_to_nothing() -> None:
    bench = Bench()
    bench.begin()
    started = time.perf_counter()
    for _ in range(10_000):
        bench.panel.tick()
    assert (time.perf_counter() - started) / 10_000 < 1e-4
    assert len(bench.seen) == 1
