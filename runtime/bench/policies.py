"""`bench policies`: every policy on the same cells of machine, model, residency, batch and phase.

All under virtual time: the simulator drives the engine's own residency, queue and policies on
synthetic chats. The cells were fixed before there were results (`policies_cells`); rivals run with
the best of their own settings per cell (`policies_measure`); the bound is what nothing may beat.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from runtime.bench import policies_text
from runtime.bench.policies_cells import Cell, by_hash, fixed_cells, full_cells, quick_cells
from runtime.bench.policies_chats import LENGTHS, SIMULATED_LAYERS
from runtime.bench.policies_measure import (
    PRESCOPE,
    RIVALS,
    Settings,
    run_cell,
    run_variants,
)
from runtime.bench.policies_summary import OURS, geomean, rows, summary, targets

ABLATIONS: Mapping[str, Settings] = {
    "without copies ahead": {"prefetch": False},
    "without protection": {"protect": False},
    "without idle-link admission": {"admit": False},
    "estimates believed unchecked": {"check": False},
    "any likelihood copied ahead": {"least_use": 0.0},
    "LRU eviction": {"eviction": "lru"},
    "decayed-frequency eviction": {"eviction": "decayed-frequency"},
    "without split constants": {"constants": False},
    "one layer ahead, not two": {"lookahead": 1},
    "no bonus for fetched experts": {"bonus": 0.0},
}
"""The parts of `prescope` that are changed one at a time, by the settings that do it."""

T = TypeVar("T")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the cells' figures and what they add up to.

    Raises:
        BoundError: a policy was faster than the bound, so the simulator is wrong.
    """
    if options.live:
        from runtime.bench.policies_live import run_live

        return {"live": run_live(options, say)}
    cells = _chosen(options)
    seed = options.seed or 0
    if options.ablate:
        return _ablate(cells, seed, options.jobs, say)
    if options.planning:
        from runtime.bench.policies_planning import measure_planning

        return {"planning": measure_planning(cells, seed), "seed": seed}
    work = partial(run_cell, seed=seed, charge_planning=options.charge_planning)
    found = run_cells(cells, work, options.jobs, say)
    figures = summary(found)
    result: dict[str, Any] = {
        "seed": seed,
        "planning_charged": options.charge_planning,
        "cells": rows(found),
        "summary": figures,
        "targets": targets(figures),
        "simulated_layers": SIMULATED_LAYERS,
        "passes": {str(batch): asdict(lengths) for batch, lengths in LENGTHS.items()},
        "settings_tried": {name: list(choices) for name, choices in {**RIVALS, **PRESCOPE}.items()},
    }
    if options.plot:
        from runtime.bench.policies_plot import draw

        draw(result, Path(options.plot))
    return result


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    if "live" in result:
        from runtime.bench.policies_live import tell_live

        return tell_live(result["live"])
    if "planning" in result:
        from runtime.bench.policies_planning import tell_planning

        return tell_planning(result["planning"])
    if "ablation" in result:
        return policies_text.tell_ablation(result)
    return policies_text.tell_policies(result)


def run_cells(
    cells: Sequence[Cell], work: Callable[[Cell], T], jobs: int, say: Callable[[str], None]
) -> list[T]:
    """Return `work` of every cell, in the cells' order, on `jobs` processes (0: one per core).

    `work` is a function of a module, or a partial of one: it is sent to spawned processes.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(cells))
    # In the order of a hash, so that the cells that take long do not come last all at once.
    tasks = [(cells.index(cell), cell, work) for cell in by_hash(cells)]
    found: dict[int, T] = {}
    for number, result in _done(tasks, jobs):
        found[number] = result
        if len(found) * 10 // len(cells) > (len(found) - 1) * 10 // len(cells):
            say(f"{len(found)} of {len(cells)} cells\n")
    return [found[number] for number in range(len(cells))]


def _done(
    tasks: Sequence[tuple[int, Cell, Callable[[Cell], T]]], jobs: int
) -> Iterator[tuple[int, T]]:
    if jobs <= 1:
        yield from map(_run_task, tasks)
        return
    # Spawned everywhere, so that all platforms do the same; the parent may have threads.
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_be_nice) as pool:
        yield from pool.imap_unordered(_run_task, tasks)


def _run_task(task: tuple[int, Cell, Callable[[Cell], T]]) -> tuple[int, T]:
    number, cell, work = task
    return number, work(cell)


def _be_nice() -> None:
    if hasattr(os, "nice"):
        os.nice(5)


def _chosen(options: argparse.Namespace) -> list[Cell]:
    if options.full:
        cells = full_cells()
    elif options.quick:
        cells = quick_cells(fixed_cells())
    else:
        cells = fixed_cells()
    if options.cells is None:
        return cells
    return by_hash(cells)[: options.cells]


def _ablate(
    cells: Sequence[Cell], seed: int, jobs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run `prescope` as it is and without each part; report what is left of its speed."""
    variants: Mapping[str, Settings] = {"": {}, **ABLATIONS}
    work = partial(run_variants, policy=OURS, variants=variants, seed=seed)
    found = run_cells(cells, work, jobs, say)
    speeds = {name: [cell[name].tokens_per_s for cell in found] for name in variants}
    whole = speeds.pop("")
    phases = [cell.phase for cell in cells]
    ablation = {}
    for name, left in speeds.items():
        ratios = [part / full for part, full in zip(left, whole, strict=True)]
        by_phase = {
            phase: [r for r, of in zip(ratios, phases, strict=True) if of == phase]
            for phase in ("decode", "prefill")
        }
        ablation[name] = {
            "settings": variants[name],
            "decode_geomean": geomean(by_phase["decode"]),
            "prefill_geomean": geomean(by_phase["prefill"]),
            "min": min(ratios),
            "max": max(ratios),
        }
    return {"ablation": ablation, "cell_count": len(cells), "seed": seed}
