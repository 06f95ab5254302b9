"""Ordinary memory for experts, in large pages where the system has them: they fill faster."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ALIGN_BYTES = 64
"""As torch aligns its own memory: the last bits of products depend on it."""


def host_memory(size_bytes: int) -> Tensor:
    """Return `size_bytes` of uint8, not initialised; it goes when its last view goes.

    Raises:
        MemoryError: there is no room.
    """
    # numpy asks Linux for large pages, torch does not. Filling small ones, zeroed one by one as
    # they are touched, takes several times as long as reading a file into them.
    memory = np.empty(size_bytes + ALIGN_BYTES, dtype=np.uint8)
    begin = -memory.ctypes.data % ALIGN_BYTES
    return torch.from_numpy(memory[begin : begin + size_bytes])
