"""Places in pinned memory for what goes to the CPU and back in the middle of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_BYTES = 2**20
_ALIGNMENT = 64
_MOST_VIEWS = 1024


class PinnedPlaces:
    """Hands out places one after another, until all are taken back at once. One thread uses it.

    Memory is allocated when more is wanted at once than ever before, and kept: the device may
    still read an older block.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._blocks: list[Tensor] = []
        self._used_bytes = 0
        # Decoding wants the same places in every layer, and a view costs more than a look-up.
        self._views: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def start_over(self) -> None:
        """Take all places back: nobody writes or reads them any more, but in the stream's order."""
        self._used_bytes = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor of that shape, with what happened to be there."""
        key = (self._used_bytes, shape, dtype)
        known = self._views.get(key)
        if known is None:
            known = self._view(shape, dtype)
        self._used_bytes += -(-known.nbytes // _ALIGNMENT) * _ALIGNMENT
        return known

    @torch.inference_mode(mode=False)  # both outlive the pass that first needs them
    def _view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        end = self._used_bytes + shape.numel() * dtype.itemsize
        if not self._blocks or end > self._blocks[-1].numel():
            had_bytes = self._blocks[-1].numel() if self._blocks else 0
            self._blocks.append(self._allocate(max(LEAST_BYTES, 2 * had_bytes, 2 * end)))
            self._views.clear()
        if len(self._views) == _MOST_VIEWS:  # prompts have many shapes
            self._views.clear()
        flat = self._blocks[-1][self._used_bytes : end]
        view = flat.view(dtype).view(shape)
        self._views[self._used_bytes, shape, dtype] = view
        return view
