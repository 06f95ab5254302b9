"""Draws the icon's PNG and ICO files; prescope.svg beside them is the same picture.

    python3 -m assets.launcher.draw_icon

A grid of experts and a lens over the one that comes next. Sampled four by
four per pixel, because the standard library can write pixels but not draw.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

FOLDER = Path(__file__).with_name("icon")
SAMPLES = 4
ICO_SIZES = (16, 32, 48, 256)

Colour = tuple[float, float, float]
TOP, BOTTOM = (0.35, 0.33, 0.93), (0.05, 0.60, 0.58)
DOT, LIT, LENS = (0.80, 0.84, 1.0), (1.0, 0.83, 0.36), (1.0, 1.0, 1.0)
CORNER = 0.22
GRID = (0.21, 0.46, 0.71)
DOTS = [(x, y) for x in GRID for y in GRID if (x, y) not in ((0.46, 0.46), (0.71, 0.71))]
LENS_CENTRE, LENS_RADIUS, LENS_WIDTH = (0.46, 0.46), 0.165, 0.05
HANDLE = ((0.585, 0.585), (0.80, 0.80), 0.045)


def colour_at(x: float, y: float) -> tuple[Colour, float]:
    """The colour and the opacity of a point of the unit square."""
    dx, dy = abs(x - 0.5) - (0.5 - CORNER), abs(y - 0.5) - (0.5 - CORNER)
    if math.hypot(max(dx, 0.0), max(dy, 0.0)) > CORNER:
        return TOP, 0.0
    (ax, ay), (bx, by), width = HANDLE
    along = min(1.0, max(0.0, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / (2 * (bx - ax) ** 2)))
    if math.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) < width:
        return LENS, 1.0
    from_lens = math.hypot(x - LENS_CENTRE[0], y - LENS_CENTRE[1])
    if abs(from_lens - LENS_RADIUS) < LENS_WIDTH / 2:
        return LENS, 1.0
    if from_lens < 0.085:
        return LIT, 1.0
    if any(math.hypot(x - a, y - b) < 0.05 for a, b in DOTS):
        return DOT, 1.0
    blend = (x + y) / 2
    red, green, blue = (t + (b - t) * blend for t, b in zip(TOP, BOTTOM, strict=True))
    return (red, green, blue), 1.0


def pixel(column: int, row: int, size: int) -> bytes:
    total, opacity = [0.0, 0.0, 0.0], 0.0
    for i in range(SAMPLES * SAMPLES):
        x = (column + (i % SAMPLES + 0.5) / SAMPLES) / size
        y = (row + (i // SAMPLES + 0.5) / SAMPLES) / size
        colour, alpha = colour_at(x, y)
        opacity += alpha
        total = [t + c * alpha for t, c in zip(total, colour, strict=True)]
    channels = [round(255 * t / max(opacity, 1e-9)) for t in total]
    return bytes([*channels, round(255 * opacity / (SAMPLES * SAMPLES))])


def png(size: int) -> bytes:
    rows = b"".join(
        b"\0" + b"".join(pixel(column, row, size) for column in range(size)) for row in range(size)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", size, size, 8, 6, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ico(pictures: dict[int, bytes]) -> bytes:
    """Windows' icon: a table of sizes, then the PNG files themselves."""
    offset = 6 + 16 * len(pictures)
    table, data = struct.pack("<HHH", 0, 1, len(pictures)), b""
    for size, picture in pictures.items():
        edge = size % 256  # 256 is written as 0
        table += struct.pack("<BBBBHHII", edge, edge, 0, 0, 1, 32, len(picture), offset + len(data))
        data += picture
    return table + data


if __name__ == "__main__":
    drawn = {size: png(size) for size in ICO_SIZES}
    (FOLDER / "prescope.png").write_bytes(drawn[256])
    (FOLDER / "prescope.ico").write_bytes(ico(drawn))
