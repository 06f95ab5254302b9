"""What a fused product is told: a record that Python writes and compiled code reads."""

from __future__ import annotations

import ctypes
from typing import Literal

Kind = Literal["fp8", "mxfp4"]

STEP_COLUMNS = 16
"""Columns and widths of blocks are multiples of this, or of a block of mxfp4."""
TILE_ROWS = 16
"""A thread takes so many rows at a time: worth asking for, and small enough for an L1 cache."""


class Job(ctypes.Structure):
    """One product: addresses of what takes part, and its sizes.

    `next_tile` begins at 0 and is shared by the threads, which count tiles with it. `block_rows`
    and `block_columns` of the matrix share a scale.
    """

    _fields_ = [
        ("next_tile", ctypes.c_int64),
        ("numbers", ctypes.c_int64),
        ("scales", ctypes.c_int64),
        ("x", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_columns", ctypes.c_int64),
    ]
