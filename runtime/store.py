"""The master copy of every expert in host memory, filled once from the model's files.

One slab per MoE layer, allocated by the device so that it is pinned where that is possible. An
expert lies in its slab exactly as it will lie in a slot. The bytes of most families go from the
file straight to their place; only a foreign dtype or order of axes takes a detour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError, MemoryPlanError
from runtime.formats import DTYPE_BYTES, ExpertFormat, Matrix, Part
from runtime.kernels import views
from runtime.safetensors_files import SafetensorsFiles, TensorEntry
from runtime.weight_forms import Codes, encode

_SCRATCH_ITEMS = 2**20


@dataclass(frozen=True)
class Piece:
    """`items` items of a file's tensor from item `first` on become items `into`... of a part."""

    part: str
    tensor: str
    first: int
    items: int
    into: int


@dataclass(frozen=True)
class Conversion:
    """A part that has to be computed from whole tensors or single rows (row None: whole)."""

    part: str
    inputs: tuple[tuple[str, int | None], ...]
    convert: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Encoding:
    """A quantised matrix with all its parts, unpacked from raw bytes of the files.

    Each input is (tensor, first byte, bytes) and reaches `unpack` as uint8 (bytes,), to keep.
    """

    matrix: Matrix
    inputs: tuple[tuple[str, int, int], ...]
    unpack: Callable[[Sequence[Tensor]], Codes]


Recipe = tuple[Piece | Conversion | Encoding, ...]


@dataclass(frozen=True)
class LayerSource:
    """Where the experts of one MoE layer come from: one recipe per expert."""

    format: ExpertFormat
    recipes: tuple[Recipe, ...]


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
        files: SafetensorsFiles,
        layers: Sequence[LayerSource],
        *,
        allocate_host: Callable[[int], Tensor],
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._formats = tuple(layer.format for layer in layers)
        self.slot_bytes = max((layout.size_bytes for layout in self._formats), default=0)
        self.ram_bytes = sum(layer.format.size_bytes * len(layer.recipes) for layer in layers)
        self._slabs: list[Tensor] = []
        fill = _Filling(files, cancelled)
        done_bytes = 0
        try:
            for number, layer in enumerate(layers):
                slab = self._allocate(allocate_host, layer.format.size_bytes * len(layer.recipes))
                self._slabs.append(slab)
                text = f"Reading the experts of layer {number + 1} of {len(layers)}"
                progress(LoadProgress(text, done_bytes, self.ram_bytes))
                for expert, recipe in enumerate(layer.recipes):
                    fill.expert(self.bytes_of(ExpertId(number, expert)), layer.format, recipe)
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
        """Give the slabs back; safe to call twice."""
        self._slabs.clear()


def bytes_in(raw: Tensor) -> memoryview:
    """Return the memory of a uint8 CPU tensor, to read into."""
    memory: Any = raw.numpy()
    return memoryview(memory)


class _Filling:
    """Carries out recipes with one small scratch buffer."""

    def __init__(self, files: SafetensorsFiles, cancelled: Callable[[], bool]) -> None:
        self._files = files
        self._cancelled = cancelled
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def expert(self, target: Tensor, layout: ExpertFormat, recipe: Recipe) -> None:
        parts = {part.name: part for part in layout.parts}
        for step in recipe:
            if self._cancelled():
                raise CancelledError("Loading was stopped.")
            if isinstance(step, Encoding):
                encode(step.unpack(self._raw(step)), step.matrix, views(target, layout))
                continue
            part = parts[step.part]
            raw = target[part.offset_bytes : part.offset_bytes + part.size_bytes]
            if isinstance(step, Conversion):
                self._convert(raw, part, step)
            else:
                self._copy(raw, part, step)

    def _copy(self, raw: Tensor, part: Part, piece: Piece) -> None:
        entry = self._files.tensors[piece.tensor]
        if entry.dtype == part.dtype:
            size = DTYPE_BYTES[part.dtype]
            place = raw[piece.into * size : (piece.into + piece.items) * size]
            self._files.read_into(piece.tensor, piece.first * size, bytes_in(place))
            return
        place = raw.view(getattr(torch, part.dtype))[piece.into : piece.into + piece.items]
        for begin in range(0, piece.items, _SCRATCH_ITEMS):
            items = min(_SCRATCH_ITEMS, piece.items - begin)
            place[begin : begin + items] = self._read(entry, piece.first + begin, items)

    def _raw(self, step: Encoding) -> list[Tensor]:
        inputs = []
        for name, first, size in step.inputs:
            inputs.append(torch.empty(size, dtype=torch.uint8))
            self._files.read_into(name, first, bytes_in(inputs[-1]))
        return inputs

    def _convert(self, raw: Tensor, part: Part, step: Conversion) -> None:
        inputs = []
        for name, row in step.inputs:
            entry = self._files.tensors[name]
            shape = entry.shape if row is None else (1, *entry.shape[1:])
            items = math.prod(shape)
            tensor = self._read(entry, 0 if row is None else row * items, items)
            inputs.append(tensor.clone().view(shape))
        raw.view(getattr(torch, part.dtype)).view(part.shape).copy_(step.convert(inputs))

    def _read(self, entry: TensorEntry, first: int, items: int) -> Tensor:
        """Return items of a tensor as they are stored; valid until the next call."""
        assert entry.dtype is not None, entry
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if self._scratch.numel() < items * dtype.itemsize:
            self._scratch = torch.empty(items * dtype.itemsize, dtype=torch.uint8)
        raw = self._scratch[: items * dtype.itemsize]
        self._files.read_into(entry.name, first * dtype.itemsize, bytes_in(raw))
        return raw.view(dtype)
