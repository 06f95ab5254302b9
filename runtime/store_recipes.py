"""Recipes: which bytes of which tensors make up an expert, and their reader.

A recipe can be carried out again for one expert at any time, as long as the files are open: the
checkpoint stays the master copy. The bytes of most families go from the file straight to their
place; only a foreign dtype or order of axes takes a detour.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.core import ExpertId
from runtime.errors import CancelledError
from runtime.formats import ALIGNMENT_BYTES, DTYPE_BYTES, ExpertFormat, Matrix, Part
from runtime.safetensors_files import TensorEntry
from runtime.weight_forms import Codes, encode, memories

_SCRATCH_ITEMS = 2**18
_TOGETHER_BYTES = 2**24
"""What is unpacked is read together up to so much, or so many numbers that go straight to their
place: a call for every tensor would cost time."""
_UNPACKING_BYTES = 2 * 2**20
"""What unpacking a few rows makes on the way, in one thread."""
RAW_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "uint8", "I8": "uint8"}
"""As what a part holds numbers of these stored dtypes, which mean nothing without their scales."""


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
    """Rows of a quantised matrix with all its parts, unpacked from raw bytes of the files.

    Each input is (tensor, first byte, bytes) and reaches `unpack` as an array of bytes, not to
    keep.
    `unpack` gives rows below each other, from row `first` of the matrix on, as `encode` takes them.
    """

    matrix: Matrix
    inputs: tuple[tuple[str, int, int], ...]
    unpack: Callable[[Sequence[NDArray[np.uint8]]], Iterable[Codes]]
    first: int = 0


Recipe = tuple[Piece | Conversion | Encoding, ...]


@dataclass(frozen=True)
class LayerSource:
    """Where the experts of one MoE layer come from: one recipe per expert."""

    format: ExpertFormat
    recipes: tuple[Recipe, ...]


class TensorFiles(Protocol):
    """Open files with a table of their tensors. Any thread may read."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    def read(self, reads: Sequence[tuple[str, int, memoryview]]) -> None:
        """Fill each buffer with bytes of a tensor, from the given one on.

        Raises:
            ModelFilesError: the file changed, was cut or cannot be read.
        """
        ...

    @property
    def cached(self) -> bool:
        """Whether nearly all of the files is in the page cache already."""
        ...

    def read_past_cache(self, on: bool) -> None:
        """Read past the page cache from now on, or through it again."""
        ...

    def close(self) -> None: ...


class RecipeSource:
    """Reads one expert after another by its recipe; an `ExpertSource` over open files.

    Any thread may read: each has scratch memory of its own, `reading_bytes` at most. `stop` is
    asked before tensors that are read together, and before each that has to be converted.
    """

    def __init__(self, files: TensorFiles, layers: Sequence[LayerSource]) -> None:
        self.stop: Callable[[], bool] = lambda: False
        self._files = files
        self._layers = tuple(layers)
        self._own = threading.local()

    def position(self, expert: ExpertId) -> tuple[int, int]:
        """Return file and byte where an expert's first step reads: sorted, files go by once."""
        step = self._layers[expert.layer].recipes[expert.expert][0]
        if isinstance(step, Piece):
            entry = self._files.tensors[step.tensor]
            return entry.file, entry.begin + step.first * (entry.size_bytes // _items(entry))
        name, first = step.inputs[0][:2]
        entry = self._files.tensors[name]
        if isinstance(step, Encoding):
            return entry.file, entry.begin + (first or 0)
        rows = entry.shape[0] if entry.shape else 1
        return entry.file, entry.begin + (first or 0) * (entry.size_bytes // max(1, rows))

    def read(self, expert: ExpertId, into: memoryview) -> None:
        """Fill `into`, format.size_bytes writable bytes, with one expert.

        Raises:
            ModelFilesError: a file changed, was cut or cannot be read.
            CancelledError: `stop` returned True.
        """
        layer = self._layers[expert.layer]
        parts = {part.name: part for part in layer.format.parts}
        places = memories(np.frombuffer(into, np.uint8), layer.format)
        for steps in _together(layer.recipes[expert.expert]):
            self._check()
            reads: list[tuple[str, int, memoryview]] = []
            encodings: list[tuple[Encoding, list[NDArray[np.uint8]]]] = []
            scratch = self._scratch(sum(map(_scratch_bytes, steps)))
            for step in steps:
                if isinstance(step, Encoding):
                    raw, scratch = _cut(scratch, step)
                    encodings.append((step, raw))
                    for (name, first, _), data in zip(step.inputs, raw, strict=True):
                        reads.append((name, first, bytes_in(data)))
                elif isinstance(step, Piece) and self._is_straight(step, parts[step.part]):
                    size = DTYPE_BYTES[parts[step.part].dtype]
                    place = places[step.part][step.into * size : (step.into + step.items) * size]
                    reads.append((step.tensor, step.first * size, bytes_in(place)))
                else:
                    self._check()
                    self._change(torch.from_numpy(places[step.part]), parts[step.part], step)
            self._files.read(reads)
            for step, raw in encodings:
                first = step.first
                for codes in step.unpack(raw):
                    encode(codes, step.matrix, places, first)
                    first += codes.rows

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._files.close()

    def _check(self) -> None:
        if self.stop():
            raise CancelledError("Loading was stopped.")

    def _is_straight(self, piece: Piece, part: Part) -> bool:
        entry = self._files.tensors[piece.tensor]
        return part.dtype == RAW_DTYPES.get(entry.stored, entry.dtype)

    def _change(self, raw: Tensor, part: Part, step: Piece | Conversion) -> None:
        """Fill a part, or a piece of it, with numbers that are not as the file has them."""
        if isinstance(step, Conversion):
            self._convert(raw, part, step)
            return
        entry = self._files.tensors[step.tensor]
        place = raw.view(getattr(torch, part.dtype))[step.into : step.into + step.items]
        for begin in range(0, step.items, _SCRATCH_ITEMS):
            items = min(_SCRATCH_ITEMS, step.items - begin)
            place[begin : begin + items] = self._read(entry, step.first + begin, items)

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
        """Return items of a tensor as they are stored; valid until this thread's next call."""
        assert entry.dtype is not None, entry
        dtype: torch.dtype = getattr(torch, entry.dtype)
        raw = self._scratch(items * dtype.itemsize)
        self._files.read([(entry.name, first * dtype.itemsize, bytes_in(raw))])
        return torch.from_numpy(raw).view(dtype)

    def _scratch(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return this thread's own memory: the same at every call, as new pages cost time."""
        scratch: NDArray[np.uint8] | None = getattr(self._own, "scratch", None)
        if scratch is None or scratch.size < size_bytes:
            # torch's memory begins where every dtype may.
            scratch = self._own.scratch = torch.empty(size_bytes, dtype=torch.uint8).numpy()
        return scratch[:size_bytes]


def reading_bytes(layers: Sequence[LayerSource]) -> int:
    """Return what one thread needs that reads experts of `layers`, beside their places.

    What goes straight to its place needs nothing, and conversions of a family's own are not
    counted.
    """
    sizes = [
        sum(map(_scratch_bytes, steps)) for layer in layers for steps in _together(layer.recipes[0])
    ]
    largest = max(sizes, default=0)
    return largest + _UNPACKING_BYTES if largest else 0


def _together(recipe: Recipe) -> Iterator[Sequence[Piece | Conversion | Encoding]]:
    """Cut a recipe into steps whose tensors are read together, at least one each time."""
    steps: list[Piece | Conversion | Encoding] = []
    size_bytes = 0
    for step in recipe:
        more_bytes = step.items if isinstance(step, Piece) else _scratch_bytes(step)
        if size_bytes and size_bytes + more_bytes > _TOGETHER_BYTES:
            yield steps
            steps, size_bytes = [], 0
        steps.append(step)
        size_bytes += more_bytes
    yield steps


def _scratch_bytes(step: Piece | Conversion | Encoding) -> int:
    if not isinstance(step, Encoding):
        return 0
    return sum(_aligned(size) for _, _, size in step.inputs)


def _cut(
    scratch: NDArray[np.uint8], step: Encoding
) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Return memory for what `step` reads, and what is left of `scratch`."""
    raw = []
    for _, _, size in step.inputs:
        raw.append(scratch[:size])
        scratch = scratch[_aligned(size) :]
    return raw, scratch


def bytes_in(raw: Tensor | NDArray[np.uint8]) -> memoryview:
    """Return the memory of a uint8 CPU tensor or array, to read into."""
    memory: Any = raw if isinstance(raw, np.ndarray) else raw.numpy()
    return memoryview(memory)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _items(entry: TensorEntry) -> int:
    return max(1, math.prod(entry.shape))
