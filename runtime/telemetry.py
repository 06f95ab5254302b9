"""Counters that the hot loop adds to, in units that close, and the pictures made of them.

`Counters` is owned by the engine thread; readers take copies. Bytes over the link close at every
moment: issued = on demand + prefetch used + late + wasted + cancelled + failed + pending.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from runtime.core import GenerationStats, TelemetrySnapshot, Verdict


@dataclass
class Counters:
    """What happened since the engine started. Expert uses count one per (layer, expert, pass).

    `ram_hits` and `ram_misses` count experts that the link or the CPU looked for in RAM.
    """

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
    guesses: int = 0
    misses_predicted: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    evictions: int = 0
    forward_passes: int = 0
    stall_s: float = 0.0
    cpu_expert_s: float = 0.0
    link_busy_s: float = 0.0
    predictor_s: float = 0.0
    ram_hits: int = 0
    ram_misses: int = 0
    disk_bytes: int = 0
    disk_stall_s: float = 0.0

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

    @property
    def predictor_recall(self) -> float | None:
        """Share of the uses that found nothing resident, but for prefetching, whose expert had
        been predicted; None where nothing was guessed."""
        missed = self.routed - self.served_resident
        return self.misses_predicted / missed if missed and self.guesses else None

    @property
    def predictor_precision(self) -> float | None:
        """Share of the prefetches that were used; None before the first."""
        return self.prefetches_used / self.prefetches if self.prefetches else None

    @property
    def ram_hit_rate(self) -> float | None:
        """Share of the experts looked for in RAM that were there; None if none was."""
        looked = self.ram_hits + self.ram_misses
        return self.ram_hits / looked if looked else None


SNAPSHOT_EVERY_S = 0.25
WINDOW_S = 1.0


@dataclass(frozen=True)
class Gauges:
    """What an engine reads off its parts when a snapshot or a statistic is due."""

    emulated: bool
    device: str
    model: str
    policy: str
    counters: Counters
    heat: bytes
    layers: int
    experts: int
    link_max_bytes_per_s: float
    vram_used_bytes: int
    vram_budget_bytes: int
    ram_used_bytes: int
    ram_total_bytes: int
    cache_slots: int
    cache_slots_used: int
    prediction: bool = False
    verdict: Verdict | None = None
    stall_s_by_layer: tuple[float, ...] = ()
    ram_experts: int | None = None


@dataclass
class Timing:
    """When one generation reached its milestones, on the device's clock.

    `counters` are those at its start, `decode_counters` and `stall_s_by_layer` those at its first
    token.
    """

    started_s: float
    counters: Counters
    prompt_tokens: int = 0
    decode_counters: Counters | None = None
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    new_tokens: int = 0
    stall_s_by_layer: tuple[float, ...] | None = None

    @classmethod
    def from_here(cls, now_s: float, counters: Counters, ttft_s: float) -> Timing:
        """Return the timing of several generations together, from now on.

        Its tokens are everybody's; `ttft_s` is what it shows as time to the first one.
        """
        return cls(now_s - ttft_s, counters, 0, counters, now_s, now_s, 1)

    def token(self, now_s: float) -> None:
        """Note a new token."""
        self.new_tokens += 1
        self.last_token_s = now_s
        if self.new_tokens == 1:
            self.first_token_s = now_s

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.started_s if self.new_tokens else 0.0

    @property
    def token_s(self) -> float:
        """Seconds per token after the first; 0 until there are two."""
        steps = self.new_tokens - 1
        return (self.last_token_s - self.first_token_s) / steps if steps > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return 1.0 / self.token_s if self.token_s > 0 else 0.0


def generation_stats(timing: Timing, gauges: Gauges, now_s: float) -> GenerationStats:
    """Describe a generation that ended at `now_s` by what the counters gained since it began.

    Expert uses, bytes and stalls are the engine's: generations that ran at the same time share
    their experts' transfers, so each shows all of them. Tokens, `ttft_s` and
    `decode_tokens_per_s` are its own.
    """
    gained = gauges.counters.since(timing.counters)
    elapsed_s = now_s - timing.started_s
    return GenerationStats(
        emulated=gauges.emulated,
        device=gauges.device,
        policy=gauges.policy,
        prompt_tokens=timing.prompt_tokens,
        new_tokens=timing.new_tokens,
        ttft_s=timing.ttft_s,
        decode_tokens_per_s=timing.tokens_per_s,
        hit_rate=gained.hit_rate,
        routed=gained.routed,
        served_resident=gained.served_resident,
        served_prefetch_in_time=gained.served_prefetch_in_time,
        served_prefetch_late=gained.served_prefetch_late,
        served_on_demand=gained.served_on_demand,
        served_cpu=gained.served_cpu,
        link_bytes_on_demand=gained.link_bytes_on_demand,
        link_bytes_prefetch_used=gained.link_bytes_prefetch_used,
        link_bytes_prefetch_wasted=gained.link_bytes_prefetch_wasted,
        link_bytes_per_s=gained.link_bytes_issued / elapsed_s if elapsed_s > 0 else 0.0,
        stall_s=gained.stall_s,
        predictor_s=gained.predictor_s,
        predictor_recall=gained.predictor_recall,
        predictor_precision=gained.predictor_precision,
        vram_used_bytes=gauges.vram_used_bytes,
        ram_used_bytes=gauges.ram_used_bytes,
        cache_slots=gauges.cache_slots,
        cache_slots_used=gauges.cache_slots_used,
        disk_bytes=gained.disk_bytes,
        disk_stall_s=gained.disk_stall_s,
        ram_hit_rate=gained.ram_hit_rate,
        ram_experts=gauges.ram_experts,
    )


class Panel:
    """Makes a snapshot of the engine four times a second while something happens.

    The engine thread owns it and calls `tick` as often as it likes: before one is due, a tick
    costs one comparison.
    """

    def __init__(
        self,
        read: Callable[[], Gauges],
        publish: Callable[[TelemetrySnapshot], None],
        now_s: Callable[[], float],
        wall_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._publish = publish
        self._now_s = now_s
        self._wall_s = wall_s
        self._due_s = 0.0
        self._sequence = 0
        self._window: deque[tuple[float, Counters]] = deque()
        self._timing: Timing | None = None
        self._generating = False

    def begin(self, timing: Timing) -> None:
        """A generation starts; `timing` is kept up to date by its owner."""
        self._timing = timing
        self._generating = True
        self._window.clear()
        self._window.append((timing.started_s, timing.counters))
        self._emit()

    def follow(self, timing: Timing) -> None:
        """Take the speeds from another timing: who generates has changed."""
        self._timing = timing

    def tick(self) -> None:
        """Publish a snapshot if one is due."""
        if self._wall_s() >= self._due_s:
            self._emit()

    def end(self) -> None:
        """The generation is over; publish its last picture."""
        self._generating = False
        self._emit()

    def refresh(self) -> None:
        """Something changed outside a generation, such as the policy; publish it."""
        self._emit()

    def _emit(self) -> None:
        self._due_s = self._wall_s() + SNAPSHOT_EVERY_S
        now_s = self._now_s()
        gauges = self._read()
        self._sequence += 1
        self._window.append((now_s, gauges.counters))
        while len(self._window) > 2 and now_s - self._window[1][0] >= WINDOW_S:
            self._window.popleft()
        self._publish(self._picture(gauges, now_s))

    def _picture(self, gauges: Gauges, now_s: float) -> TelemetrySnapshot:
        since_s, earlier = self._window[0]
        recent = gauges.counters.since(earlier)
        timing = self._timing or Timing(now_s, gauges.counters)
        decode = gauges.counters.since(timing.decode_counters or gauges.counters)
        steps = max(1, timing.new_tokens - 1)
        span_s = now_s - since_s
        verdict = gauges.verdict
        return TelemetrySnapshot(
            sequence=self._sequence,
            emulated=gauges.emulated,
            device=gauges.device,
            model=gauges.model,
            policy=gauges.policy,
            generating=self._generating,
            tokens_per_s=timing.tokens_per_s,
            ttft_s=timing.ttft_s,
            served=recent.served,
            hit_rate=recent.hit_rate,
            link_bytes_per_s=recent.link_bytes_issued / span_s if span_s > 0 else 0.0,
            link_max_bytes_per_s=gauges.link_max_bytes_per_s,
            link_bytes_total=gauges.counters.link_bytes_issued,
            stall_s_per_token=decode.stall_s / steps,
            token_s=timing.token_s,
            cpu_s_per_token=decode.cpu_expert_s / steps,
            vram_used_bytes=gauges.vram_used_bytes,
            vram_budget_bytes=gauges.vram_budget_bytes,
            ram_used_bytes=gauges.ram_used_bytes,
            ram_total_bytes=gauges.ram_total_bytes,
            cache_slots=gauges.cache_slots,
            cache_slots_used=gauges.cache_slots_used,
            layers=gauges.layers,
            experts=gauges.experts,
            heat=base64.b64encode(gauges.heat).decode("ascii"),
            prediction=gauges.prediction,
            prefetch_bytes_per_token=(
                decode.link_bytes_prefetch_used / steps,
                decode.link_bytes_prefetch_late / steps,
                (decode.link_bytes_prefetch_wasted + decode.link_bytes_cancelled) / steps,
            ),
            predictor_recall=decode.predictor_recall,
            predictor_precision=decode.predictor_precision,
            predictor_s_per_token=decode.predictor_s / steps,
            verdict="" if verdict is None else verdict.text,
            trial_tokens_per_s=None if verdict is None else verdict.pair,
            stall_s_by_layer=self._stalls(gauges, steps),
            disk_bytes_per_s=recent.disk_bytes / span_s if span_s > 0 else 0.0,
            disk_bytes_total=gauges.counters.disk_bytes,
            disk_stall_s_per_token=decode.disk_stall_s / steps,
            ram_hit_rate=recent.ram_hit_rate,
            ram_experts=gauges.ram_experts,
        )

    def _stalls(self, gauges: Gauges, steps: int) -> tuple[float, ...]:
        """Return seconds per token and layer since the running or last generation's prompt."""
        timing = self._timing
        if timing is None or not timing.new_tokens or timing.stall_s_by_layer is None:
            return tuple(0.0 for _ in gauges.stall_s_by_layer)
        pairs = zip(gauges.stall_s_by_layer, timing.stall_s_by_layer, strict=True)
        return tuple((now - then) / steps for now, then in pairs)
