"""Experts in host memory: a cache of the model's files, which stay the master copy.

An expert lies in its place exactly as it will lie in a slot of the device. Places are allocated in
blocks by the device, so that they are pinned where that is possible.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from runtime.core import ExpertId, LoadProgress
from runtime.formats import ExpertFormat
from runtime.ram_tier import RamTier
from runtime.store_blocks import Blocks
from runtime.store_loading import Job, Loading
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

DIRECT_FROM_BYTES = 2**30
"""What is smaller is read through the page cache, from where the next load has it at once."""


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
    """The experts of one model in host memory: all of them, or as many as `ram_experts` says.

    Filled by its constructor with the first experts of every layer, in the order of the files.
    `tier` says which expert lies where; from then on it belongs to whoever reads further experts
    with `fill`. The memory, `source` and `files` belong to the store until `close`; nothing may
    read a view after that.

    Raises:
        ModelFilesError: a file cannot be read to the end.
        MemoryPlanError: `allocate_host` has no room for a block.
        CancelledError: `cancelled` said so; all memory is given back by then.
    """

    def __init__(
        self,
        files: TensorFiles,
        layers: Sequence[LayerSource],
        *,
        source: ExpertSource | None = None,
        allocate_host: Callable[[int], Tensor],
        release_host: Callable[[Tensor], None] = lambda block: None,
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
        ram_experts: int | None = None,
    ) -> None:
        self._formats = tuple(layer.format for layer in layers)
        self._files = files
        self._source = RecipeSource(files, layers) if source is None else source
        sizes = tuple(layout.size_bytes for layout in self._formats)
        everybody = [
            ExpertId(number, expert)
            for number, layer in enumerate(layers)
            for expert in range(len(layer.recipes))
        ]
        count = len(everybody)
        places = count if ram_experts is None else min(ram_experts, count)
        self.slot_bytes = max(sizes, default=0)
        self.most_experts = places
        self.total_bytes = sum(sizes[expert.layer] for expert in everybody)
        self.resizable = places < count or len(set(sizes)) == 1
        """Whether places can be given up: any place suits any expert."""
        if self.resizable:
            place_bytes = [self.slot_bytes] * places
        else:
            place_bytes = [sizes[expert.layer] for expert in everybody]
        self.tier = RamTier(sizes, max(1, places))
        self.tier.complete = places == count
        self._blocks = Blocks(place_bytes, allocate_host, release_host, self.total_bytes)
        # The same share of every layer: nobody knows yet who will be used.
        chosen = sorted(everybody, key=lambda e: (e.expert, e.layer))[:places]
        # A store that is dropped without `close` still gives its files back.
        self._close_files = weakref.finalize(self, _close, self._source, files)
        try:
            self._load(chosen, progress, cancelled)
        except BaseException:
            self.close()
            raise

    @property
    def ram_bytes(self) -> int:
        """How much memory the experts' places take now."""
        return self._blocks.size_bytes

    def bytes_of(self, expert: ExpertId) -> Tensor:
        """Return a view of the bytes of an expert in RAM, uint8 (format.size_bytes,)."""
        place = self.tier.place_of(expert)
        assert place is not None, f"{expert} is not in RAM"
        return self._blocks.memory(place)[: self._formats[expert.layer].size_bytes]

    def fill(self, expert: ExpertId, place: int) -> None:
        """Read an expert into a place. Any thread may, several at a time.

        Raises:
            ModelFilesError: it cannot be read.
        """
        memory = self._blocks.memory(place)[: self._formats[expert.layer].size_bytes]
        self._source.read(expert, bytes_in(memory))

    def keep(self, places: int) -> None:
        """Give the memory back that only places from number `places` on take, or take it again.

        Raises:
            MemoryPlanError: there is no room for more; what was there stays.
        """
        self._blocks.release(places)
        self._blocks.need(places)

    def format_of(self, layer: int) -> ExpertFormat:
        """Return the layout shared by all experts of MoE layer `layer`."""
        return self._formats[layer]

    def close(self) -> None:
        """Give the memory and the files back; safe to call twice."""
        self._blocks.release(0)
        self._close_files()

    def _load(
        self,
        experts: Sequence[ExpertId],
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Read `experts`, in the order in which the files have them."""
        loading = Loading(
            lambda job: self.fill(job.expert, job.place), self._blocks.need, progress, cancelled
        )
        position: Callable[[ExpertId], tuple[int, int]] = _by_layer
        if isinstance(self._source, RecipeSource):
            position = self._source.position
            self._source.stop = loading.stopped.is_set
        if self.resizable:
            experts = sorted(experts, key=position)
        else:
            experts = sorted(experts)  # every place has the size of its own expert
        sizes = [layout.size_bytes for layout in self._formats]
        jobs = [Job(e, self.tier.place(e), sizes[e.layer]) for e in experts]
        jobs.sort(key=lambda job: position(job.expert))
        large = sum(job.size_bytes for job in jobs) >= DIRECT_FROM_BYTES
        self._files.read_past_cache(large and not self._files.cached)
        loading.run(jobs, len(self._formats))
        # What is read again would lie in RAM twice if it went through the page cache.
        self._files.read_past_cache(True)
        if isinstance(self._source, RecipeSource):
            self._source.stop = lambda: False


def _close(source: ExpertSource, files: TensorFiles) -> None:
    source.close()
    files.close()


def _by_layer(expert: ExpertId) -> tuple[int, int]:
    return expert.layer, expert.expert
