"""The picture of `bench policies`: every cell as a dot, and the policies' means as bars.

Drawn with Pillow at 1600 pixels, to be read at 800.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from runtime.bench.policies_text import Row, geomean

WIDTH, STRIP_HEIGHT, BAR_HEIGHT = 1600, 560, 420
MARGIN, GAP = 110, 50
PAPER, INK, MUTED, LINE = "#fdfcf9", "#1c2127", "#565c66", "#e2ddd1"
AHEAD, BEHIND, PREFILL = "#12806f", "#b3362b", "#2d6cb8"
LOWEST, HIGHEST = 0.9, 1.3
"""The scale of ratios, unless a cell lies beyond it."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a result to `path`, as the suffix says (PNG)."""
    image = Image.new("RGB", (WIDTH, STRIP_HEIGHT + BAR_HEIGHT + 3 * GAP), PAPER)
    canvas = ImageDraw.Draw(image)
    rows = result["cells"]
    _strips(canvas, [row for row in rows if row["policy"] == "prescope"])
    _bars(canvas, [row for row in rows if row["phase"] == "decode"], STRIP_HEIGHT + 2 * GAP)
    image.save(path)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _strips(canvas: ImageDraw.ImageDraw, rows: Sequence[Row]) -> None:
    """One strip per batch: ratio to the best rival, cells sorted, decode and prefill apart."""
    canvas.text(
        (MARGIN, 18),
        "PreScope over the best rival, one dot per cell (virtual time)",
        INK,
        _font(30),
    )
    batches = sorted({row["batch"] for row in rows})
    top, bottom = 80, STRIP_HEIGHT
    width = (WIDTH - MARGIN - GAP) / max(1, len(batches))

    ratios: list[float] = [row["ratio_to_best_rival"] for row in rows]
    low = min([LOWEST, *(math.floor(ratio * 10) / 10 for ratio in ratios)])
    high = max([HIGHEST, *(math.ceil(ratio * 10) / 10 for ratio in ratios)])

    def y_of(ratio: float) -> float:
        return bottom - (ratio - low) / (high - low) * (bottom - top)

    step = 0.1 if high - low < 0.8 else 0.2 if high - low < 1.6 else 1.0
    for tick in (low + step * number for number in range(round((high - low) / step) + 1)):
        y = y_of(tick)
        canvas.line((MARGIN, y, WIDTH - GAP, y), LINE, 2)
        canvas.text((MARGIN - 12, y), f"{tick:.1f}", MUTED, _font(24), anchor="rm")
    canvas.line((MARGIN, y_of(1.0), WIDTH - GAP, y_of(1.0)), INK, 2)
    for number, batch in enumerate(batches):
        left = MARGIN + number * width
        for phase, start, share in (("decode", 0.02, 0.6), ("prefill", 0.68, 0.26)):
            ratios = sorted(
                row["ratio_to_best_rival"]
                for row in rows
                if row["batch"] == batch and row["phase"] == phase
            )
            for index, ratio in enumerate(ratios):
                x = left + width * (start + share * (index + 0.5) / len(ratios))
                y, colour = y_of(ratio), PREFILL if phase == "prefill" else AHEAD
                canvas.ellipse((x - 4, y - 4, x + 4, y + 4), BEHIND if ratio < 0.98 else colour)
            if ratios:
                middle = left + width * (start + share / 2)
                label = f"{phase} {geomean(ratios):.2f}"
                canvas.text((middle, bottom + 8), label, MUTED, _font(25), anchor="ma")
        canvas.text((left + width / 2, bottom + 36), f"batch {batch}", INK, _font(26), anchor="ma")


def _bars(canvas: ImageDraw.ImageDraw, rows: Sequence[Row], top: int) -> None:
    """One bar per policy: decode tokens/s over the bound, geometric mean of the cells."""
    if not rows:
        return
    title = "Decode tokens/s as a share of what the bound allows, geometric mean"
    canvas.text((MARGIN, top + 10), title, INK, _font(30))
    policies = dict.fromkeys(row["policy"] for row in rows)
    means = {
        name: geomean(row["ratio_to_bound"] for row in rows if row["policy"] == name)
        for name in policies
    }
    first, height = top + 70, (BAR_HEIGHT - 30) / len(means)
    left, span = MARGIN + 130, WIDTH - MARGIN - 130 - 3 * GAP
    for number, (name, mean) in enumerate(sorted(means.items(), key=lambda item: item[1])):
        y = first + number * height
        colour = AHEAD if name == "prescope" else MUTED if name == "oracle" else PREFILL
        canvas.rectangle((left, y, left + span * mean, y + height * 0.7), colour)
        middle = y + height * 0.35
        canvas.text((left - 12, middle), name, INK, _font(24), anchor="rm")
        label = f"{mean:.2f}"
        canvas.text((left + span * mean + 10, middle), label, INK, _font(24), anchor="lm")
