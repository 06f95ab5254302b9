"""`bench policies --planning`: how long the engine's thread decides per layer, for each model's shape.

Wall time of everything that decides: the policy, and residency, which carries its choices out in
the books. On whatever runs this: Python, one thread. The modelled machine is that of the first fixed
cell, by hash, with the model and the batch; the chats are the cell's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

from runtime.bench.policies_cells import MAIN_MODELS, Cell, by_hash
from runtime.bench.policies_measure import watch_policy
from runtime.bench.policies_models import MODELS
from runtime.residency import Residency

BATCHES = (1, 4, 16, 64)
POLICIES = ("prescope", "hybrid")
CALLS = ("routed", "computed", "ahead", "ended", "stalled", "layer_done")
T = TypeVar("T")


class _Timed:
    """Adds up the seconds of each layer's calls; a layer ends with `layer_done`."""

    def __init__(self) -> None:
        self.layers_s: list[float] = []
        self._open_s = 0.0

    def watch(self, residency: Residency) -> None:
        """Time the calls of this residency from now on."""
        for name in CALLS:
            setattr(residency, name, self._timing(getattr(residency, name), name))

    def _timing(self, call: Callable[..., T], name: str) -> Callable[..., T]:
        def timed(*arguments: Any) -> T:
            began_s = perf_counter()
            result = call(*arguments)
            self._open_s += perf_counter() - began_s
            if name == CALLS[-1]:
                self.layers_s.append(self._open_s)
                self._open_s = 0.0
            return result

        return timed


def measure_planning(cells: Sequence[Cell], seed: int = 0) -> list[dict[str, Any]]:
    """Return one row per main model and batch of `BATCHES` that has a decode cell."""
    rows = []
    for name in MAIN_MODELS:
        for batch in BATCHES:
            fitting = [c for c in by_hash(cells) if (c.model, c.batch) == (name, batch)]
            chosen = next((c for c in fitting if c.phase == "decode"), None)
            if chosen is None:
                continue
            model = MODELS[name]
            row = {
                "model": name,
                "experts": model.experts,
                "top_k": model.top_k,
                "batch": batch,
            }
            for policy in POLICIES:
                timed = _Timed()
                watch_policy(chosen, policy, timed.watch, seed)
                row["layers_timed"] = len(timed.layers_s)
                row[f"{policy}_us_per_layer"] = 1e6 * median(timed.layers_s)
            rows.append(row)
    return rows


def tell_planning(rows: Sequence[dict[str, Any]]) -> str:
    """Put the rows into a table."""
    lines = ["What deciding takes on this computer, in microseconds per layer (median):"]
    head = "".join(f"{policy:>10}" for policy in POLICIES)
    lines.append(f"{'model':24}{'experts':>8}{'top-k':>6}{'batch':>6}{head}")
    for row in rows:
        figures = "".join(f"{row[f'{policy}_us_per_layer']:10.0f}" for policy in POLICIES)
        lines.append(
            f"{row['model']:24}{row['experts']:8}{row['top_k']:6}{row['batch']:6}{figures}"
        )
    return "\n".join(lines) + "\n"
