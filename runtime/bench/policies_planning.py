"""`bench policies --planning`: how long `prescope` thinks per layer, for each model's shape.

Wall time of the policy's own calls, on whatever runs this: Python, one thread. The modelled machine
is that of the first fixed cell, by hash, with the model and the batch; the chats are the cell's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

from runtime.bench.policies_cells import MAIN_MODELS, Cell, by_hash
from runtime.bench.policies_measure import watch_ours
from runtime.bench.policies_models import MODELS
from runtime.policy import Policy

BATCHES = (1, 64)
CALLS = ("place", "beside", "between")
T = TypeVar("T")


class _Timed:
    """Adds up the seconds of each layer's calls; a layer ends with `between`."""

    def __init__(self) -> None:
        self.layers_s: list[float] = []
        self._open_s = 0.0

    def watch(self, policy: Policy) -> None:
        """Time the calls of this policy from now on."""
        for name in CALLS:
            setattr(policy, name, self._timing(getattr(policy, name), name))

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
            timed = _Timed()
            watch_ours(chosen, timed.watch, seed)
            model = MODELS[name]
            rows.append(
                {
                    "model": name,
                    "experts": model.experts,
                    "top_k": model.top_k,
                    "batch": batch,
                    "layers_timed": len(timed.layers_s),
                    "median_us_per_layer": 1e6 * median(timed.layers_s),
                    "ms_per_token": 1e3 * model.layers * median(timed.layers_s),
                }
            )
    return rows


def tell_planning(rows: Sequence[dict[str, Any]]) -> str:
    """Put the rows into a table."""
    lines = ["What planning takes on this computer, per layer (median) and per pass:"]
    lines.append(f"{'model':24}{'experts':>8}{'top-k':>6}{'batch':>6}{'us':>8}{'ms':>7}")
    lines += [
        f"{row['model']:24}{row['experts']:8}{row['top_k']:6}{row['batch']:6}"
        f"{row['median_us_per_layer']:8.0f}{row['ms_per_token']:7.1f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
