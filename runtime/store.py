"""Experts in host memory: a cache of the model's files, which stay the master copy.

An expert lies in its place exactly as it will lie in a slot of the device. Places are allocated in
blocks by the device, so that they are pinned where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError, MemoryPlanError
from runtime.formats import ExpertFormat
from runtime.store_recipes import (
    Conversion,
    Encoding,
    LayerSource,
    Piece,
    Recipe,
    RecipeSource,
    TensorFiles,
    bytes_in,
)

__all__ = [
    "Conversion",
    "Encoding",
    "ExpertSource",
    "ExpertStore",
    "LayerSource",
    "Piece",
    "Recipe",
    "bytes_in",
]


class ExpertSource(Protocol):
    """Where an expert's bytes come from, at any time while it is open. Any thread may read."""

    def read(self, expert: ExpertId, into: memoryview) -> None:
        """Fill `into`, format.size_bytes writable bytes, with one expert as it lies in a slot.

        Raises:
            ModelFilesError: what it reads from changed, was cut or cannot be read.
        """
        ...

    def close(self) -> None:
        """Give the files back; safe to call twice."""
        ...


class ExpertStore:
    """All experts of one model in host memory.

    Filled by its constructor; afterwards read-only, so any thread may read. The slabs belong to
    the store until `close`; nothing may read a view after that.

    Raises:
        ModelFilesError: a file cannot be read to the end.
        MemoryPlanError: `allocate_host` has no room for a slab.
        CancelledError: `cancelled` said so; all slabs are gone by then.
    """

    def __init__(
        self,
        files: TensorFiles,
        layers: Sequence[LayerSource],
        *,
        source: ExpertSource | None = None,
        allocate_host: Callable[[int], Tensor],
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._formats = tuple(layer.format for layer in layers)
        self.slot_bytes = max((layout.size_bytes for layout in self._formats), default=0)
        self.ram_bytes = sum(layer.format.size_bytes * len(layer.recipes) for layer in layers)
        self._slabs: list[Tensor] = []
        if source is None:
            source = RecipeSource(files, layers)
            source.stop = cancelled
        self._source = source
        done_bytes = 0
        try:
            for number, layer in enumerate(layers):
                slab = self._allocate(allocate_host, layer.format.size_bytes * len(layer.recipes))
                self._slabs.append(slab)
                text = f"Reading the experts of layer {number + 1} of {len(layers)}"
                progress(LoadProgress(text, done_bytes, self.ram_bytes))
                for expert in range(len(layer.recipes)):
                    if cancelled():
                        raise CancelledError("Loading was stopped.")
                    at = ExpertId(number, expert)
                    source.read(at, bytes_in(self.bytes_of(at)))
                done_bytes += slab.numel()
        except BaseException:
            self.close()
            raise
        progress(LoadProgress("All experts are in memory", done_bytes, self.ram_bytes))

    def _allocate(self, allocate_host: Callable[[int], Tensor], size_bytes: int) -> Tensor:
        try:
            return allocate_host(size_bytes)
        except (MemoryError, RuntimeError) as error:
            raise MemoryPlanError(
                f"The experts need {self.ram_bytes / 2**30:.2f} GiB of memory, and there is no"
                f" room for the next {size_bytes / 2**20:.1f} MiB of them.",
                "Close other programs, or choose a smaller model.",
            ) from error

    def bytes_of(self, expert: ExpertId) -> Tensor:
        """Return a view of one expert's bytes, uint8 (format.size_bytes,)."""
        size = self._formats[expert.layer].size_bytes
        return self._slabs[expert.layer][expert.expert * size : (expert.expert + 1) * size]

    def format_of(self, layer: int) -> ExpertFormat:
        """Return the layout shared by all experts of MoE layer `layer`."""
        return self._formats[layer]

    def close(self) -> None:
        """Give the slabs back and close the source; safe to call twice."""
        self._slabs.clear()
        self._source.close()
