"""`bench formats`: what every way of holding experts costs, in time, bytes and quality.

Speed: one expert of Qwen3-30B's shape with random weights, computed on this CPU in bfloat16 by
every form in turn, from a pool larger than the caches. Reported are ratios to bfloat16 weights in
the same run, each side's fastest round, because other programs only ever make one slower. Quality:
the model's experts quantised, its held-out chats read with their right answers; an answer counts as
right if every token of it, its end included, is the most likely one, which is to say that greedy
decoding would give it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from runtime.bench.formats_quality import quality_of_experts
from runtime.config import model_folder
from runtime.formats import ExpertFormat, Form, Matrix, lay_out
from runtime.kernels import ExpertMath, views
from runtime.kernels_crossover import measured_few_tokens
from runtime.kernels_quantised import FEW_TOKENS, has_packed_op
from runtime.weight_forms import dequantise, form_for, held, parts_of

HIDDEN, INNER = 2048, 768
TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 7
POOL_BYTES = 96 * 2**20
FORMS = {
    "int4, groups of 32": Form("int4", 1, 32, zeros=True),
    "int4, groups of 64": Form("int4", 1, 64, zeros=True),
    "int4, groups of 128": Form("int4", 1, 128, zeros=True),
    "int8, rows": Form("int8"),
    "int8, groups of 32": Form("int8", 1, 32),
    "fp8, blocks of 128": Form("fp8", 128, 128),
    "mxfp4": Form("mxfp4", 1, 32),
}
PLAIN = ("bfloat16", "float32")


@dataclass(frozen=True)
class _Side:
    """One way of holding an expert: several of them, to be used in turn."""

    math: ExpertMath
    layout: ExpertFormat
    experts: tuple[dict[str, Tensor], ...]
    dtype: torch.dtype

    def rows(self, number: int, x: Tensor) -> Tensor:
        weights = torch.ones((x.shape[0], 1), dtype=self.dtype)
        return self.math.rows(self.experts[number % len(self.experts)], x.to(self.dtype), weights)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return ratios of time and bytes, errors, and what the model's answers lose.

    Raises:
        ModelError: the model cannot be opened.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "shape": {"hidden": HIDDEN, "inner": INNER},
            "tokens": list(TOKENS),
            "forms": _speed(say),
            "model": options.model,
            "quality": quality_of_experts(model_folder(options.model), _chats(), say),
        }
    finally:
        torch.set_num_threads(threads)


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    counts = result["tokens"]
    lines = ["CPU time per expert as a ratio to bfloat16 weights, by tokens that it serves:"]
    lines.append(f"{'':22}" + "".join(f"{count:>8}" for count in counts) + "   bytes   error")
    for name, form in result["forms"].items():
        times = "".join(f"{form['time_ratio'][str(count)]:8.2f}" for count in counts)
        lines.append(f"{name:22}{times}{form['bytes_ratio']:8.2f}{form['relative_error']:8.1e}")
    lines.append("error: of the rows, relative RMS, against the same weights dequantised")
    quality = result["quality"]
    lines.append(f"\nAnswers of {result['model']} on {quality['chats']} held-out chats:")
    for name, one in quality["experts"].items():
        lines.append(
            f"{name:22} right {one['exact_match']:6.1%}   same tokens {one['same_tokens']:6.2%}"
            f"   mean KL {one['mean_kl']:.2e} nat   bytes {one['bytes_ratio']:.2f}"
        )
    return "\n".join(lines) + "\n"


def _chats() -> Path:
    from runtime.bench.predictor_reading import CHATS

    return Path(__file__).resolve().parents[2] / "assets" / "traces" / CHATS


def _speed(say: Callable[[str], None]) -> dict[str, Any]:
    sides = {name: _plain_side(getattr(torch, name)) for name in PLAIN}
    sides |= {name: _quantised_side(form) for name, form in FORMS.items()}
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in TOKENS} for name in sides}
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        for count in TOKENS:
            say(f"Timing {count} tokens per expert\n")
            x = torch.randn((count, HIDDEN), generator=generator)
            for round_ in range(ROUNDS + 1):
                for name in sides if round_ % 2 else reversed(sides):
                    began_s = time.perf_counter()
                    sides[name].rows(round_, x)
                    times[name][count].append(time.perf_counter() - began_s)
    fastest = {
        name: {count: min(taken) for count, taken in mine.items()} for name, mine in times.items()
    }
    base = sides["bfloat16"].layout.size_bytes
    return {
        name: {
            "time_ratio": {str(n): fastest[name][n] / fastest["bfloat16"][n] for n in TOKENS},
            "bytes_ratio": side.layout.size_bytes / base,
            "relative_error": _relative_error(side),
            "few_tokens": side.math.few_tokens if side.layout.matrices else None,
        }
        for name, side in sides.items()
    }


def _activate(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return silu(gate) * up


def _math() -> ExpertMath:
    return ExpertMath("up", "down", None, None, transposed=False, activate=_activate)


def _pool(layout: ExpertFormat, first: Tensor) -> tuple[dict[str, Tensor], ...]:
    experts = -(-POOL_BYTES // layout.size_bytes)
    slab = first.repeat(experts, 1)
    return tuple(views(flat, layout) for flat in slab)


def _plain_side(dtype: torch.dtype) -> _Side:
    name = str(dtype).removeprefix("torch.")
    layout = lay_out([("up", (2 * INNER, HIDDEN), name), ("down", (HIDDEN, INNER), name)])
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for part in views(flat, layout).values():
        part.copy_(torch.randn(part.shape) * part.shape[1] ** -0.5)
    return _Side(_math(), layout, _pool(layout, flat), dtype)


def _quantised_side(form: Form) -> _Side:
    form = form_for(form, torch.bfloat16)
    matrices = [
        Matrix(name, shape, form)
        for name, shape in (("up", (2 * INNER, HIDDEN)), ("down", (HIDDEN, INNER)))
    ]
    layout = lay_out([part for matrix in matrices for part in parts_of(matrix)], matrices)
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    parts = views(flat, layout)
    for matrix in matrices:
        _randomise(matrix, parts)
    packed = has_packed_op(matrices[0], torch.bfloat16)
    few_tokens = measured_few_tokens(matrices[0]) if packed else FEW_TOKENS
    math = _math().reading(layout, few_tokens)
    return _Side(math, layout, _pool(layout, flat), torch.bfloat16)


def _randomise(matrix: Matrix, parts: Mapping[str, Tensor]) -> None:
    """Fill the parts of a matrix at random, its values of the order of 1 / sqrt(inputs)."""
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    size = matrix.shape[1] ** -0.5
    if matrix.form.kind == "fp8":
        numbers.copy_(torch.randn(numbers.shape).to(torch.float8_e4m3fn))
    else:
        raw = numbers.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
    if matrix.form.kind == "mxfp4":
        scales.fill_(127 + round(torch.tensor(size / 3).log2().item()))
        return
    spread = {"int8": 74.0, "int4": 4.6, "fp8": 1.0}[matrix.form.kind]
    scales.copy_(size / spread * (0.75 + 0.5 * torch.rand(scales.shape)))
    if matrix.form.zeros:
        scales[..., 1] = size / 4 * torch.randn(scales.shape[:-1])


def _relative_error(side: _Side) -> float:
    x = torch.randn((8, HIDDEN), generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    parts = side.experts[0]
    whole = {m.name: dequantise(held(m, parts), torch.float32) for m in side.layout.matrices}
    up, down = (whole[name] if whole else parts[name].float() for name in ("up", "down"))
    exact = linear(_activate(linear(x.float(), up)), down)
    with torch.inference_mode():
        errors = [side.rows(0, x).float() - exact, side.rows(0, x.repeat(32, 1))[:8] - exact]
    worst = max(error.square().sum().item() for error in errors)
    return float((worst / exact.square().sum().item()) ** 0.5)
