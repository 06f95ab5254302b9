"""Up to how many tokens a CPU multiplies fastest by a quantised matrix as it is held: measured.

It depends on the CPU, its threads, the form and the shape, so it is timed once for each, for about
a tenth of a second, and kept: the same machine rounds the same way tomorrow.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.formats import ExpertFormat, Matrix, lay_out
from runtime.kernels import views
from runtime.kernels_quantised import FEW_TOKENS, has_packed_op, multiply
from runtime.weight_forms import parts_of

LADDER = (1, 2, 4, 8, 16, 32, 64, 128)
FILE = "cpu_crossovers.json"
_ROUNDS = 3
_MOST_ENTRIES = 1000

log = logging.getLogger("prescope.kernels")


def assumed_few_tokens(layout: ExpertFormat) -> int:
    """Return the number that stands for a measurement where none may be made."""
    return FEW_TOKENS


class Crossovers:
    """Measures on first use and keeps it in `folder`; one thread uses it."""

    def __init__(self, folder: Path, measure: Callable[[Matrix], int] | None = None) -> None:
        self._file = folder / FILE
        self._measure = measure or measured_few_tokens
        self._known = _read(self._file)

    def few_tokens(self, layout: ExpertFormat) -> int:
        """Return up to how many tokens the largest matrix of `layout` is multiplied as held."""
        matrices = [m for m in layout.matrices if has_packed_op(m, torch.bfloat16)]
        if not matrices:
            return FEW_TOKENS
        matrix = max(matrices, key=lambda each: each.shape[0] * each.shape[1])
        key = _key(matrix)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._measure(matrix)
            self._save()
        return known

    def _save(self) -> None:
        partial = self._file.with_suffix(".partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            os.replace(partial, self._file)
        except OSError as error:
            log.warning("%s cannot be kept: %s. It is measured again next time.", self._file, error)


def measured_few_tokens(matrix: Matrix) -> int:
    """Time both ways at growing numbers of tokens; 0: dequantising is always faster."""
    layout = lay_out(parts_of(matrix), [matrix])
    flat = torch.randint(0, 64, (layout.size_bytes,), dtype=torch.uint8)
    parts = views(flat, layout)
    few = 0
    with torch.inference_mode():
        for tokens in LADDER:
            x = torch.randn((tokens, matrix.shape[1])).to(torch.bfloat16)
            held, first = (_fastest_s(matrix, parts, x, limit) for limit in (tokens, 0))
            if held > first:
                break
            few = tokens
    return few


def _fastest_s(
    matrix: Matrix, parts: dict[str, torch.Tensor], x: torch.Tensor, few_tokens: int
) -> float:
    fastest_s = float("inf")
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        multiply(matrix, parts, x, few_tokens)
        fastest_s = min(fastest_s, time.perf_counter() - began_s)
    return fastest_s


def _key(matrix: Matrix) -> str:
    form = matrix.form
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    how = f"{form.kind} {form.rows}x{form.columns} {form.zeros} {form.scale_dtype}"
    return f"torch {torch.__version__}, {cpu}: {how}, {matrix.shape[0]}x{matrix.shape[1]}"


def _read(file: Path) -> dict[str, int]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s. It is measured again.", file, error)
        return {}
    if not isinstance(kept, dict) or len(kept) > _MOST_ENTRIES:
        return {}
    return {
        key: value
        for key, value in kept.items()
        if isinstance(key, str) and type(value) is int and 0 <= value <= LADDER[-1]
    }
