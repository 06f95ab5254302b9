"""The header of one GGUF file that nobody vouches for: its metadata and where its tensors lie.

The format: magic, version, counts, key-value pairs, tensor records, padding, data. Everything a
number in it could ask for (memory, time, bytes elsewhere in the file) is checked against a limit
or the file's own size before it is used. The layout is that of ggml's docs/gguf.md.
"""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_types import TYPES

MAX_HEADER_BYTES = 64 * 2**20
MAX_STRINGS = 2**21
MAX_PAIRS = 2**16
MAX_TENSORS = 2**16
MAX_KEY_BYTES = 2**16
MAX_NAME_BYTES = 256
MAX_RANK = 4
MAX_ALIGNMENT = 2**20
_DEFAULT_ALIGNMENT = 32
_PIECE_BYTES = 2**20
_COUNT = struct.Struct("<Q")
_KIND = struct.Struct("<I")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_AGAIN = "Download this file again, or choose another model."


@dataclass(frozen=True)
class GgufTensor:
    """A tensor record: `shape` is (..., outputs, inputs), `begin` counts from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What one file says. Values are bool, int, float, str, lists of str, or 1-D number arrays."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(file: io.FileIO, path: Path) -> GgufHeader:
    """Read and check the header of `file`, which stands at its start; `path` is for messages.

    Raises:
        ModelFilesError: the file is damaged or hostile.
        UnsupportedModelError: its version or one of its tensor types is not known.
    """
    reader = _Reader(file, path)
    tensors, pairs = _begin(reader)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text("a key", MAX_KEY_BYTES)
        if key in metadata:
            damaged(path, f"the key {key[:120]!r} is there twice")
        metadata[key] = reader.value(key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
        damaged(path, f"its alignment is {str(alignment)[:40]}")
    if alignment & (alignment - 1):
        damaged(path, f"its alignment is {alignment}, which is no power of two")
    records = [_tensor_record(reader) for _ in range(tensors)]
    data = _aligned(reader.at, alignment)
    return GgufHeader(metadata, _place(records, data, alignment, reader))


def read_outline(file: io.FileIO, path: Path) -> tuple[str, int]:
    """Return the architecture and the number of experts, 0 for none, and read little for it.

    Nothing else is checked. Raises as `read_header` does.
    """
    reader = _Reader(file, path)
    _, pairs = _begin(reader)
    metadata: dict[str, Any] = {}
    architecture = ""
    for _ in range(pairs):
        key = reader.text("a key", MAX_KEY_BYTES)
        if key.startswith("tokenizer.") or reader.at > _PIECE_BYTES:
            break  # Long lists follow, and a writer has told of the model by now.
        metadata[key] = reader.value(key)
        architecture = metadata.get("general.architecture", "")
        if f"{architecture}.expert_count" in metadata:
            break
    experts = metadata.get(f"{architecture}.expert_count")
    return str(architecture), experts if type(experts) is int else 0


def damaged(path: Path, what: str) -> NoReturn:
    """Raise the error of a file that is damaged or hostile."""
    raise ModelFilesError(f"{path.name}: {what}.", _AGAIN)


class _Reader:
    """Takes values off the start of a file, reading no more of it than they need."""

    def __init__(self, file: io.FileIO, path: Path) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._file = file
        self._held = bytearray()
        self._strings = 0

    def raw(self, count: int) -> bytes:
        self._hold(count)
        self.at += count
        return bytes(self._held[self.at - count : self.at])

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        self._hold(layout.size)
        self.at += layout.size
        return layout.unpack_from(self._held, self.at - layout.size)

    def count(self) -> int:
        return self.take(_COUNT)[0]

    def text(self, what: str, limit: int) -> str:
        length = self.count()
        if length > limit:
            damaged(self.path, f"{what} claims {length} bytes, and at most {limit} are read")
        return self._decoded(what, self.raw(length))

    def value(self, key: str) -> Any:
        (kind,) = self.take(_KIND)
        if kind == _STRING:
            return self.text(f"the value of {key[:120]!r}", MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        (kind,) = self.take(_KIND)
        count = self.count()
        if kind == _STRING:
            return self._texts(key, count)
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> Any:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            what = "lists of lists" if kind == _ARRAY else f"values of the unknown type {kind}"
            damaged(self.path, f"{key[:120]!r} has {what}")
        self._check_room(count * dtype.itemsize, key)
        numbers = np.frombuffer(self.raw(count * dtype.itemsize), dtype)
        if kind != _BOOL:
            return numbers
        if numbers.size and numbers.max() > 1:
            damaged(self.path, f"{key[:120]!r} is neither true nor false, but {numbers.max()}")
        return numbers.astype(bool)

    def _texts(self, key: str, count: int) -> list[str]:
        self._strings += count
        if self._strings > MAX_STRINGS:
            damaged(self.path, f"{key[:120]!r} brings the texts to {self._strings}")
        self._check_room(count * _COUNT.size, key)
        texts: list[str] = []
        held, at, unpack = self._held, self.at, _COUNT.unpack_from
        for _ in range(count):
            # Checked here, not by calls, because a vocabulary has a million of these.
            if at + 8 > len(held):
                self.at = at
                self._hold(8)
            end = at + 8 + unpack(held, at)[0]
            if end > len(held):
                self.at = at
                self._hold(end - at)
            texts.append(self._decoded(key, held[at + 8 : end]))
            at = end
        self.at = at
        return texts

    def _decoded(self, what: str, raw: bytes | bytearray) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            damaged(self.path, f"{what[:140]} is not UTF-8")

    def _check_room(self, size_bytes: int, key: str) -> None:
        """Refuse a length that neither the file nor the limit has room for."""
        if self.at + size_bytes > min(self.size, MAX_HEADER_BYTES):
            damaged(self.path, f"{key[:120]!r} claims {size_bytes} of the file's {self.size} bytes")

    def _hold(self, count: int) -> None:
        """Make sure that the next `count` bytes are in memory."""
        end = self.at + count
        if end > self.size:
            damaged(self.path, f"its header asks for byte {end}, but the file has {self.size}")
        if end > MAX_HEADER_BYTES:
            damaged(self.path, f"its header is longer than {MAX_HEADER_BYTES} bytes")
        while len(self._held) < end:
            piece = self._file.read(max(_PIECE_BYTES, end - len(self._held)))
            if not piece:
                damaged(self.path, f"it ends at byte {len(self._held)}, inside its header")
            self._held += piece


def _begin(reader: _Reader) -> tuple[int, int]:
    """Take magic, version and counts; return how many tensors and pairs there are."""
    path = reader.path
    if reader.raw(4) != b"GGUF":
        damaged(path, "it does not begin with GGUF")
    (version,) = reader.take(_KIND)
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        what = "is written for big-endian machines" if big_endian else f"has version {version}"
        raise UnsupportedModelError(
            f"{path.name} {what}; GGUF versions 2 and 3 can be read.", "Choose a newer file."
        )
    tensors, pairs = reader.count(), reader.count()
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        damaged(path, f"it claims {tensors} tensors and {pairs} keys")
    return tensors, pairs


def _tensor_record(reader: _Reader) -> GgufTensor:
    """Read one record; its `begin` still counts from the start of the data."""
    path = reader.path
    name = reader.text("a tensor's name", MAX_NAME_BYTES)
    (rank,) = reader.take(_KIND)
    if not 1 <= rank <= MAX_RANK:
        damaged(path, f"tensor {name!r} has {rank} dimensions")
    shape = tuple(reader.count() for _ in range(rank))[::-1]
    if not all(0 < size < 2**62 for size in shape) or math.prod(shape) >= 2**62:
        damaged(path, f"tensor {name!r} has the shape {shape}")
    (number,) = reader.take(_KIND)
    if number not in TYPES:
        raise UnsupportedModelError(
            f"{path.name}: tensor {name!r} is of the unknown type {number}.",
            "Choose a version of this model in another quantisation.",
        )
    kind, per_block, block_bytes = TYPES[number]
    if shape[-1] % per_block:
        damaged(path, f"tensor {name!r} is {kind}, but its rows of {shape[-1]} fill no blocks")
    size_bytes = math.prod(shape) // per_block * block_bytes
    return GgufTensor(name, kind, shape, reader.count(), size_bytes)


def _place(
    records: list[GgufTensor], data: int, alignment: int, reader: _Reader
) -> tuple[GgufTensor, ...]:
    """Check that the records cover the data exactly, each at its aligned place."""
    path, names = reader.path, set[str]()
    placed = []
    at = data
    for record in sorted(records, key=lambda record: record.begin):
        begin = data + record.begin
        if record.name in names:
            damaged(path, f"tensor {record.name!r} is there twice")
        names.add(record.name)
        if begin != at:
            damaged(path, f"tensor {record.name!r} begins at byte {begin} instead of {at}")
        end = begin + record.size_bytes
        if end > reader.size:
            damaged(path, f"tensor {record.name!r} ends at byte {end} of {reader.size}")
        at = _aligned(end, alignment)
        placed.append(GgufTensor(record.name, record.type, record.shape, begin, record.size_bytes))
    if reader.size > max(at, data):
        damaged(path, f"it has {reader.size} bytes, but its header describes {max(at, data)}")
    return tuple(placed)


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
