"""The result of `bench policies` for a person: tables, targets, and the worst cells with reasons.

Works on the JSON object alone, so that a committed result reads the same as a fresh one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WORST = 10
Row = Mapping[str, Any]
CELL_KEYS = ("machine", "model", "residency", "batch", "phase", "setting")


def tell_policies(result: Mapping[str, Any]) -> str:
    """Put a whole result into words and tables."""
    rows: Sequence[Row] = result["cells"]
    parts = [
        f"{result['summary']['cells']} cells, {result['simulated_layers']} layers of each model "
        "simulated, all rates assumed. Ratios are geometric means.\n"
    ]
    groups = {(row["phase"], row["batch"]) for row in rows}
    for phase, batch in sorted(groups):
        chosen = [row for row in rows if (row["phase"], row["batch"]) == (phase, batch)]
        parts.append(_table(f"{phase}, batch {batch}", chosen))
    parts.append(_summary(result["summary"], result["targets"]))
    parts.append(_worst(rows))
    return "\n".join(parts)


def tell_ablation(result: Mapping[str, Any]) -> str:
    """Put an ablation into a table: what is left of the speed without each part."""
    lines = [
        f"PreScope with one part changed over PreScope as it is, {result['cell_count']} cells:"
    ]
    lines.append(f"{'changed':30}{'decode':>8}{'prefill':>9}{'worst':>8}{'best':>8}")
    for name, part in result["ablation"].items():
        values = (part["decode_geomean"], part["prefill_geomean"], part["min"], part["max"])
        decode, prefill, least, most = (f"{v:.3f}" if v is not None else "-" for v in values)
        lines.append(f"{name:30}{decode:>8}{prefill:>9}{least:>8}{most:>8}")
    return "\n".join(lines) + "\n"


def by_cell(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Group the rows of one cell by policy, cells in the order of their first row."""
    cells: defaultdict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[tuple(row[key] for key in CELL_KEYS)][row["policy"]] = row
    return list(cells.values())


def rival_of(cell: Mapping[str, Row]) -> Row:
    """Return the row of the best rival in a cell."""
    rivals = [row for name, row in cell.items() if name not in ("prescope", "oracle")]
    return max(rivals, key=lambda row: float(row["tokens_per_s"]))


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean of at least one value."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _table(title: str, rows: Sequence[Row]) -> str:
    lines = [
        f"{title}, {len(by_cell(rows))} cells",
        f"{'policy':14}{'tok/s':>9}{'best rival':>12}{'oracle':>8}{'bound':>7}{'hits':>6}"
        f"{'link busy':>11}{'CPU busy':>10}{'stall ms':>10}",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        ratios = [
            geomean(row[key] for row in mine)
            for key in ("tokens_per_s", "ratio_to_best_rival", "ratio_to_oracle", "ratio_to_bound")
        ]
        means = [
            sum(row[key] for row in mine) / len(mine)
            for key in ("hit_rate", "link_busy_share", "cpu_busy_share", "stall_s")
        ]
        lines.append(
            f"{policy:14}{ratios[0]:9.1f}{ratios[1]:12.3f}{ratios[2]:8.3f}{ratios[3]:7.3f}"
            f"{means[0]:6.2f}{means[1]:11.2f}{means[2]:10.2f}{1e3 * means[3]:10.2f}"
        )
    return "\n".join(lines) + "\n"


def _summary(summary: Mapping[str, float | None], targets: Sequence[Row]) -> str:
    lines = ["Targets"]
    for target in targets:
        value = target["value"]
        verdict = {True: "met", False: "NOT MET", None: "no cell"}[target["met"]]
        aim = f", aim {target['aim']:g}" if target["aim"] else ""
        figure = "-" if value is None else f"{value:.3f}"
        wanted = f">= {target['at_least']:g}{aim}"
        lines.append(f"  {target['figure']:42}{figure:>8}  {wanted:22}{verdict}")
    named = {target["figure"] for target in targets}
    for name, value in summary.items():
        if name not in named:
            figure = (
                "-" if value is None else f"{value:g}" if value == int(value) else f"{value:.3f}"
            )
            lines.append(f"  {name:42}{figure:>8}")
    return "\n".join(lines) + "\n"


def _worst(rows: Sequence[Row]) -> str:
    cells = sorted(by_cell(rows), key=lambda cell: float(cell["prescope"]["ratio_to_best_rival"]))
    lines = [f"The {min(WORST, len(cells))} worst cells of prescope, MB per token"]
    for cell in cells[:WORST]:
        ours, rival = cell["prescope"], rival_of(cell)
        lines.append(
            f"{ours['ratio_to_best_rival']:.3f}  {ours['machine']}, {ours['model']}, "
            f"{ours['residency'] * 100:.0f} %, batch {ours['batch']}, {ours['phase']}"
        )
        lines += [_moved(row) for row in (ours, rival)]
        lines.append(f"       {why(ours, rival)}")
    return "\n".join(lines) + "\n"


def _moved(row: Row) -> str:
    moved = {cause: size / 1e6 for cause, size in row["bytes_by_cause"].items() if size}
    settings = ",".join(map(str, row["settings"].values()))
    name = f"{row['policy']}[{settings}]" if settings else row["policy"]
    return (
        f"       {name:34} {row['tokens_per_s']:9.1f} tok/s, hits {row['hit_rate']:.2f}, link "
        f"{row['link_busy_share']:.2f}, CPU {row['cpu_busy_share']:.2f}, stall "
        f"{1e3 * row['stall_s']:.2f} ms; "
        + ", ".join(f"{cause} {size:.3g}" for cause, size in moved.items())
    )


def why(ours: Row, rival: Row) -> str:
    """Say what differs most between two rows, as far as their figures tell."""
    ours_s, rival_s = (1.0 / row["tokens_per_s"] for row in (ours, rival))
    stalled = (
        ours["stall_s"] / ours["pass_s"] * ours_s - rival["stall_s"] / rival["pass_s"] * rival_s
    )
    on_cpu = ours["cpu_busy_share"] * ours_s - rival["cpu_busy_share"] * rival_s
    more = {"stall": stalled / rival_s, "CPU time": on_cpu / rival_s}
    reasons = [f"{name} {value:+.1%} of the rival's token" for name, value in more.items()]
    moved = ours["bytes_by_cause"]
    idle = sum(moved[cause] for cause in ("prefetch_late", "prefetch_wasted", "cancelled"))
    if idle > moved["prefetch_used"]:
        reasons.append(f"copied ahead in vain {idle / 1e6:.3g} MB a token")
    if ours["hit_rate"] < rival["hit_rate"] - 0.005:
        reasons.append(f"hits {ours['hit_rate'] - rival['hit_rate']:+.3f}")
    return "; ".join(reasons)
