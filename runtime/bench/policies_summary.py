"""What the cells of `bench policies` add up to: ratios, geometric means, targets met or not.

A rival is every policy but `prescope` and `oracle`; the best rival of a cell is the fastest there.
The link has slack in a cell where the best rival leaves it idle more than half of the time and its
rate is at least 0.4 of the CPU's: copies ahead have room then, and are not hopelessly slower than
computing the miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.bench.policies_cells import Cell, Phase
from runtime.bench.policies_measure import CellResults, Result
from runtime.machines import CPUS, LINKS

OURS = "prescope"
NOT_RIVALS = (OURS, "oracle")
SLACK_BUSY_SHARE = 0.5
SLACK_LINK_TO_CPU = 0.4


@dataclass(frozen=True)
class Target:
    """A figure of the summary and what it has to reach; `aim` is what we hope for."""

    figure: str
    at_least: float
    aim: float | None = None


TARGETS = (
    Target("min_vs_best_rival", 0.98),
    Target("decode_geomean_vs_best_rival", 1.05, aim=1.10),
    Target("decode_geomean_vs_best_rival_link_slack", 1.10),
    Target("decode_geomean_vs_on_demand", 1.4),
    Target("decode_geomean_vs_oracle", 0.85),
    Target("prefill_min_vs_best_rival", 0.98),
    Target("throughput_vs_layer_stream_paper_setting", 2.41),
    Target("latency_cut_paper_setting", 0.746),
)


def best_rival(results: CellResults, other_than: str = OURS) -> Result:
    """Return the fastest rival in a cell, leaving out `other_than`."""
    rivals = [r for name, r in results.results.items() if name not in (*NOT_RIVALS, other_than)]
    return max(rivals, key=lambda result: result.tokens_per_s)


def link_to_cpu(cell: Cell) -> float:
    """Return the link's rate over the CPU's."""
    return LINKS[cell.machine.link] / CPUS[cell.machine.cpu].expert_bytes_per_s


def has_link_slack(results: CellResults) -> bool:
    """Say whether the link has slack in a cell, as defined above."""
    idle = best_rival(results).link_busy_share < SLACK_BUSY_SHARE
    return idle and link_to_cpu(results.cell) >= SLACK_LINK_TO_CPU


def rows(results: Sequence[CellResults]) -> list[dict[str, Any]]:
    """Return one JSON object per cell and policy."""
    return [
        {
            "machine": cell.cell.machine.name,
            **cell.cell.to_json(),
            "fits": cell.cell.fits,
            **asdict(result),
            "ratio_to_oracle": _ratio(result, cell.results.get("oracle")),
            "ratio_to_best_rival": _ratio(result, best_rival(cell, name)),
            "link_slack": has_link_slack(cell),
        }
        for cell in results
        for name, result in cell.results.items()
    ]


def summary(results: Sequence[CellResults]) -> dict[str, float | None]:
    """Return the figures of the comparison; None where no cell counts for one."""
    decode = [cell for cell in results if cell.cell.phase == "decode"]
    prefill = [cell for cell in results if cell.cell.phase == "prefill"]
    paper = [cell for cell in results if cell.cell.setting == "paper"]
    slack = [cell for cell in decode if has_link_slack(cell)]
    over_stream = [against(cell, "layer-stream") for cell in paper]
    throughput = geomean(over_stream)
    return {
        "cells": len(results),
        "decode_geomean_vs_best_rival": geomean(map(against_best_rival, decode)),
        "decode_geomean_vs_best_rival_link_slack": geomean(map(against_best_rival, slack)),
        "link_slack_cells": len(slack),
        "prefill_geomean_vs_best_rival": geomean(map(against_best_rival, prefill)),
        "prefill_min_vs_best_rival": _least(map(against_best_rival, prefill)),
        "min_vs_best_rival": _least(map(against_best_rival, results)),
        "cells_below_0.98": sum(against_best_rival(cell) < 0.98 for cell in results),
        "decode_geomean_vs_oracle": geomean(against(cell, "oracle") for cell in decode),
        "decode_geomean_vs_on_demand": geomean(against(cell, "on-demand") for cell in decode),
        "decode_geomean_vs_bound": geomean(cell.results[OURS].ratio_to_bound for cell in decode),
        "throughput_vs_layer_stream_paper_setting": throughput,
        "throughput_vs_layer_stream_paper_setting_best": max(over_stream, default=None),
        "latency_cut_paper_setting": None if throughput is None else 1.0 - 1.0 / throughput,
        "latency_cut_paper_setting_best": max((1.0 - 1.0 / r for r in over_stream), default=None),
    }


def targets(figures: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return every target with its figure and whether it is met; None where nothing counted."""
    told = []
    for target in TARGETS:
        value = figures[target.figure]
        met = None if value is None else value >= target.at_least
        told.append({**asdict(target), "value": value, "met": met})
    return told


def geomeans(
    results: Sequence[CellResults], phase: Phase, batch: int
) -> dict[str, tuple[float, float, float]]:
    """Return, per policy, its geometric mean over the best rival, the oracle and the bound.

    A rival is compared with the best of the others. Empty where no cell counts.
    """
    cells = [c for c in results if c.cell.phase == phase and c.cell.batch == batch]
    means: dict[str, tuple[float, float, float]] = {}
    for name in cells[0].results if cells else ():
        ratios: tuple[Callable[[CellResults, str], float], ...] = (
            _over_best_rival,
            _over_oracle,
            _over_bound,
        )
        found = [geomean(ratio(cell, name) for cell in cells) or 0.0 for ratio in ratios]
        means[name] = (found[0], found[1], found[2])
    return means


def against(cell: CellResults, policy: str) -> float:
    """Return our tokens/s over another policy's."""
    return cell.results[OURS].tokens_per_s / cell.results[policy].tokens_per_s


def against_best_rival(cell: CellResults) -> float:
    """Return our tokens/s over the best rival's."""
    return cell.results[OURS].tokens_per_s / best_rival(cell).tokens_per_s


def geomean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _ratio(result: Result, other: Result | None) -> float | None:
    return None if other is None else result.tokens_per_s / other.tokens_per_s


def _over_best_rival(cell: CellResults, name: str) -> float:
    return cell.results[name].tokens_per_s / best_rival(cell, name).tokens_per_s


def _over_oracle(cell: CellResults, name: str) -> float:
    return cell.results[name].tokens_per_s / cell.results["oracle"].tokens_per_s


def _over_bound(cell: CellResults, name: str) -> float:
    return cell.results[name].ratio_to_bound
