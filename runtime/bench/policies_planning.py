"""`bench policies --planning`: how long the engine's thread decides per layer, for every policy.

Wall time of everything that decides: the policy, and residency, which keeps the books. On whatever
runs this: Python, one thread. Each model's modelled machine is that of the first fixed cell, by
hash, with the model and the batch; the chats are the cell's. `--charge-planning` charges the lines
that are fitted here, as measured on the machine that `assets/bench/planning.json` names.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from runtime.activation_tracing_collection import ActivationMatrix, Collection, Match
from runtime.bench.policies_cells import MAIN_MODELS, Cell, by_hash
from runtime.bench.policies_measure import ORACLE, PRESCOPE, RIVALS, watch_policy
from runtime.bench.policies_models import MODELS
from runtime.hardware import cpu_name
from runtime.residency import Residency

BATCHES = (1, 4, 16, 64)
ROUNDS = 3
STEPS: Mapping[str, tuple[str, ...]] = {
    "routed": ("routed", "computed"),
    "ahead": ("ahead",),
    "done": ("ended", "stalled", "layer_done"),
}
"""What the device waits for, what is weighed while it computes, and what ends the layer."""
PAPER_MATCH_US = {1000: 21.0, 10000: 226.0}
"""Microseconds of one look-up by the number of entries, as MoE-Infinity reports them."""
T = TypeVar("T")


class _Timed:
    """The seconds of each layer's calls, by step, and how many experts were routed."""

    def __init__(self) -> None:
        self.layers: list[dict[str, float]] = []
        self.experts: list[int] = []
        self._open = dict.fromkeys(STEPS, 0.0)

    def watch(self, residency: Residency) -> None:
        """Time the calls of this residency from now on; `layer_done` is a layer's last."""
        for step, calls in STEPS.items():
            for name in calls:
                setattr(residency, name, self._timing(getattr(residency, name), name, step))

    def _timing(self, call: Callable[..., T], name: str, step: str) -> Callable[..., T]:
        def timed(*arguments: Any) -> T:
            began_s = perf_counter()
            result = call(*arguments)
            self._open[step] += perf_counter() - began_s
            if name == "routed":
                self.experts.append(len(arguments[1].demands))
            elif name == "layer_done":
                self.layers.append(self._open)
                self._open = dict.fromkeys(STEPS, 0.0)
            return result

        return timed


def measure_planning(cells: Sequence[Cell], seed: int = 0) -> dict[str, Any]:
    """Return means per model, batch and policy, and per policy a line through them by experts."""
    policies = (*PRESCOPE, *RIVALS, ORACLE)
    rows: list[dict[str, Any]] = []
    for name in MAIN_MODELS:
        for batch in BATCHES:
            fitting = [c for c in by_hash(cells) if (c.model, c.batch) == (name, batch)]
            chosen = next((c for c in fitting if c.phase == "decode"), None)
            if chosen is not None:
                rows += (_row(chosen, policy, seed) for policy in policies)
    lines = {
        policy: _lines([row for row in rows if row["policy"] == policy]) for policy in policies
    }
    machine = f"{cpu_name()}, Python {platform.python_version()}"
    match_us = {str(entries): match_us_with(entries) for entries in PAPER_MATCH_US}
    return {
        "machine": machine,
        "rows": rows,
        "policies": lines,
        "moe_infinity_match_us": match_us,
        "moe_infinity_match_us_in_the_paper": {str(n): us for n, us in PAPER_MATCH_US.items()},
    }


def match_us_with(entries: int) -> float:
    """Time one layer's step of MoE-Infinity's match, in a collection of so many requests.

    The shape is Mixtral-8x7B's. The paper compares whole matrices at every look-up; here a match
    grows by one row per layer, so that each row is compared once.
    """
    layers, experts, top_k = 32, 8, 2
    draw = np.random.default_rng(0)
    collection = Collection(2 * layers, experts, entries)
    for _ in range(entries):
        matrix = ActivationMatrix(2 * layers, experts)
        for row in range(2 * layers):
            matrix.add(row, {int(e): 1 for e in draw.permutation(experts)[:top_k]})
        collection.add(matrix)
    match, fastest_s = Match(collection), float("inf")
    for row in range(2 * layers):
        began_s = perf_counter()
        match.add(row, {0: 1, 3: 1})
        match.similarities().argmax()
        fastest_s = min(fastest_s, perf_counter() - began_s)
    return 1e6 * fastest_s


def _row(cell: Cell, policy: str, seed: int) -> dict[str, Any]:
    """Time one policy in one cell; of several runs the fastest says what deciding takes."""
    runs = []
    for _ in range(ROUNDS):
        timed = _Timed()
        watch_policy(cell, policy, timed.watch, seed)
        runs.append({step: _mean(layer[step] for layer in timed.layers) for step in STEPS})
    steps_s = {step: min(run[step] for run in runs) for step in STEPS}
    model = MODELS[cell.model]
    return {
        "model": cell.model,
        "experts": model.experts,
        "top_k": model.top_k,
        "batch": cell.batch,
        "policy": policy,
        "layers_timed": len(timed.layers),
        "routed_experts": mean(timed.experts),
        **{f"{step}_us": 1e6 * seconds for step, seconds in steps_s.items()},
        "us_per_layer": 1e6 * sum(steps_s.values()),
    }


def _mean(seconds: Iterable[float]) -> float:
    """Return the mean without the longest in fifty, when something else had the processor."""
    ordered = sorted(seconds)
    return mean(ordered[: max(1, len(ordered) - len(ordered) // 50)])


def _lines(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit each step's seconds by base + slope x routed experts, neither below zero."""
    experts = np.array([row["routed_experts"] for row in rows], np.float64)
    fitted = {}
    for step in STEPS:
        seconds = np.array([row[f"{step}_us"] for row in rows]) * 1e-6
        # Relative deviations count: short layers are as many as long ones.
        sides = np.stack([np.ones_like(experts), experts], axis=1) / seconds[:, None]
        base, slope = np.linalg.lstsq(sides, np.ones_like(seconds), rcond=None)[0]
        if base < 0.0 or slope < 0.0:
            base, slope = (float(np.median(seconds)), 0.0) if slope < 0.0 else (0.0, slope)
        fitted[step] = {"base_s": round(float(base), 9), "expert_s": round(float(slope), 10)}
    return fitted


def tell_planning(planning: Mapping[str, Any]) -> str:
    """Put the result into tables."""
    lines = [f"What deciding takes on this computer ({planning['machine']}), in microseconds per"]
    lines.append("layer: until its work is ordered + copies ahead + its end.")
    lines.append(f"{'model':24}{'experts':>8}{'top-k':>6}{'batch':>6}  policy")
    for row in planning["rows"]:
        steps = " + ".join(f"{row[f'{step}_us']:.0f}" for step in STEPS)
        lines.append(
            f"{row['model']:24}{row['experts']:8}{row['top_k']:6}{row['batch']:6}  "
            f"{row['policy']:14}{row['us_per_layer']:6.0f} = {steps}"
        )
    for entries, paper_us in planning["moe_infinity_match_us_in_the_paper"].items():
        match_us = planning["moe_infinity_match_us"][entries]
        lines.append(
            f"MoE-Infinity's match among {entries} requests, per layer: {match_us:.0f} us "
            f"(in the paper, per look-up: {paper_us:.0f})"
        )
    return "\n".join(lines) + "\n"
