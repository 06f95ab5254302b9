"""Reading safetensors files that nobody vouches for.

Headers are checked here, before any library sees them. Data is read with positioned reads into
memory of ours: a mapped file that shrinks kills the process, a short read is an error.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from runtime.disk_direct import DirectFiles, is_cached
from runtime.errors import ModelFilesError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 32 * 2**20
MAX_INDEX_BYTES = 32 * 2**20
MAX_RANK = 8
MAX_TENSORS = 2**17
"""In one file. Real shards have hundreds; parsing more than this takes seconds."""
MAX_JSON_VALUES = 2**20
READ_BYTES = 32 * 2**20
_MOST_BUFFERS = 64
"""A system takes 1,024 of them in one call."""
# The dtypes of the format, in bytes; torch names only for those that can be loaded as they are.
_DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "I16": (2, "int16"),
    "U16": (2, None),
    "I32": (4, "int32"),
    "U32": (4, None),
    "I64": (8, "int64"),
    "U64": (8, None),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
    "F8_E8M0": (1, None),
}
_PREADV = getattr(os, "preadv", None)  # Windows has no positioned reads.
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
# Windows opens a device under these names, whatever follows the first dot.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9])", re.IGNORECASE)
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pickle")
_AGAIN = "Download this file again, or choose another model."


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` counts bytes from the start of file number `file`.

    `dtype` is torch's name, or None for a dtype that cannot be loaded as it is (`stored`).
    """

    name: str
    file: int
    begin: int
    size_bytes: int
    stored: str
    dtype: str | None
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The open shards of one model and a table of their tensors. Reads are thread-safe.

    A file that is changed while it is open is not read any more. After `read_past_cache` data is
    read past the page cache, where the system can.

    Raises:
        ModelFilesError: a file is missing, damaged or hostile; the message names it.
    """

    _past_cache: DirectFiles | None = None

    def __init__(self, folder: Path) -> None:
        self._start()
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map else [_single_file(folder)]
        self.paths = tuple(folder / name for name in names)
        try:
            for number, path in enumerate(self.paths):
                self._add(number, path)
            self._check_against(weight_map)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Hold no file yet. Readers of other formats begin with this too."""
        self.tensors: dict[str, TensorEntry] = {}
        self._files: list[io.FileIO] = []
        self._states: list[tuple[int, int]] = []
        self._seeking = threading.Lock()

    def _open(self, path: Path) -> io.FileIO:
        """Open the next file and remember its state."""
        file = open_regular(path)
        self._files.append(file)
        self._states.append(_state_of(file))
        return file

    def read(self, reads: Sequence[tuple[str, int, memoryview]]) -> None:
        """Fill each buffer (writable bytes) with the named tensor's bytes from the given one on.

        What lies one after another in a file is read in one go, whatever the order of `reads`.

        Raises:
            ModelFilesError: a file changed, was cut or cannot be read.
        """
        located = []
        for name, begin, buffer in reads:
            entry = self.tensors[name]
            assert 0 <= begin <= begin + len(buffer) <= entry.size_bytes, (name, begin, len(buffer))
            if len(buffer):
                located.append((entry.file, entry.begin + begin, buffer))
        located.sort(key=lambda each: each[:2])
        run: list[memoryview] = []
        file = start = end = -1
        for number, at, buffer in located:
            if run and (number, at) != (file, end) or len(run) == _MOST_BUFFERS:
                self._read_run(file, start, run)
                run = []
            if not run:
                file, start = number, at
            run.append(buffer)
            end = at + len(buffer)
        if run:
            self._read_run(file, start, run)
        # Only now: they may have been changed while they were read.
        for number in {number for number, _, _ in located}:
            if _state_of(self._files[number]) != self._states[number]:
                _damaged(self.paths[number], "it was changed while the model is loaded")

    def _read_run(self, number: int, at: int, buffers: list[memoryview]) -> None:
        """Fill `buffers`, one after another, with the bytes of a file from `at` on."""
        while buffers:
            some = buffers
            if len(buffers[0]) > READ_BYTES:
                some = [buffers[0][:READ_BYTES]]
            try:
                count = self._read_at(number, some, at)
            except (OSError, ValueError) as error:
                _damaged(self.paths[number], f"reading at byte {at} failed ({error})")
            if count == 0:
                _damaged(
                    self.paths[number], f"it ends at byte {at}, inside {self._name(number, at)}"
                )
            at += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers[0])
                buffers = buffers[1:]
            if count:
                buffers = [buffers[0][count:], *buffers[1:]]

    def _name(self, number: int, at: int) -> str:
        """Name the tensor that has byte `at` of a file."""
        inside = (
            entry.name
            for entry in self.tensors.values()
            if entry.file == number and entry.begin <= at < entry.begin + entry.size_bytes
        )
        return f"tensor {next(inside)!r}"

    def close(self) -> None:
        """Close all files; safe to call twice."""
        self.read_past_cache(False)
        for file in self._files:
            file.close()

    def _add(self, number: int, path: Path) -> None:
        file = self._open(path)
        for entry in _read_header(file, path, number):
            other = self.tensors.get(entry.name)
            if other is not None:
                _damaged(path, f"tensor {entry.name!r} is also in {self.paths[other.file].name}")
            self.tensors[entry.name] = entry

    def _check_against(self, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            entry = self.tensors.get(name)
            if entry is None or self.paths[entry.file].name != shard:
                _damaged(self.paths[0].with_name(shard), f"it lacks tensor {name[:120]!r}")

    def read_past_cache(self, on: bool) -> None:
        """Read data past the page cache from now on, or through it again."""
        if on and self._past_cache is None and _PREADV is not None:
            self._past_cache = DirectFiles(self._files)
        elif not on and self._past_cache is not None:
            self._past_cache.close()
            self._past_cache = None

    @property
    def cached(self) -> bool:
        """Whether nearly all of every file is in the page cache already."""
        return all(map(is_cached, self._files))

    def _read_at(self, number: int, buffers: Sequence[memoryview], at: int) -> int:
        """Read some bytes into the first of `buffers`, or into several; 0 at the file's end."""
        file = self._files[number]
        if self._past_cache is not None:
            return self._past_cache.read_at(number, buffers, at)
        if _PREADV is not None:
            count: int = _PREADV(file.fileno(), buffers, at)
            return count
        with self._seeking:
            file.seek(at)
            return file.readinto(buffers[0]) or 0


def _state_of(file: io.FileIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def read_json(path: Path, max_bytes: int, max_depth: int = 32) -> dict[str, Any]:
    """Return the JSON object in a file of at most `max_bytes`.

    Raises:
        ModelFilesError: missing, too large, too deep, a key twice, or not an object.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            _damaged(path, f"{size} bytes, but at most {max_bytes} are read")
        record = _parse(path, file.read(max_bytes + 1) or b"")
    level: list[Any] = [record]
    for _ in range(max_depth):
        below = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for items in below for item in items if isinstance(item, (dict, list))]
        if not level:
            return record
    _damaged(path, f"it is nested deeper than {max_depth} levels")


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading.

    Raises:
        ModelFilesError: it is missing, cannot be opened, or is a pipe, device or folder.
    """
    try:
        # Asking before opening keeps a named pipe from blocking us for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            _damaged(path, "it is not a regular file")
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        raise ModelFilesError(f"{path.name} is missing from {path.parent}.", _AGAIN) from error
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path.name} cannot be opened ({error}).", _AGAIN) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor -> shard from the index, checked; empty where there is no index."""
    if not folder.is_dir():
        raise ModelFilesError(f"{folder} is not a folder.", "Choose the folder of a model.")
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _damaged(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _names_a_shard(shard):
            _damaged(path, f"tensor {name[:80]!r} is said to lie in {str(shard)[:80]!r}")
    for shard in sorted(set(weight_map.values())):
        if (folder / shard).is_symlink() and not _stays_in_cache(folder / shard):
            _damaged(folder / shard, "it is a link that leads out of the model's folder")
    return weight_map


def _names_a_shard(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None and not _DEVICE.fullmatch(name.partition(".")[0])


def _single_file(folder: Path) -> str:
    if (folder / SINGLE_NAME).exists():
        return SINGLE_NAME
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    raise ModelFilesError(
        f"{folder.name} has no {SINGLE_NAME} and no {INDEX_NAME}"
        + (f", only {', '.join(others[:3])}." if others else "."),
        "Only safetensors and GGUF files are read; choose a model that has them.",
    )


def _stays_in_cache(path: Path) -> bool:
    # The hub's download cache keeps `snapshots/<commit>/<file>` as links to `blobs/<hash>`.
    target = path.resolve()
    return target.parent in (path.parent.resolve(), path.parent.resolve().parent.parent / "blobs")


def _read_header(file: io.FileIO, path: Path, number: int) -> list[TensorEntry]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        _damaged(path, f"it has {size} bytes, fewer than the 8 of a header length")
    (length,) = struct.unpack("<Q", file.read(8) or b"")
    if length > min(MAX_HEADER_BYTES, size - 8):
        _damaged(path, f"its header claims {length} bytes of the file's {size}")
    text = file.read(length) or b""
    # Counting takes milliseconds; parsing a header made to be slow, seconds and a GB.
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b",") > 8 * MAX_TENSORS:
        _damaged(path, f"its header describes more than {MAX_TENSORS} tensors")
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        _damaged(path, "its __metadata__ is not an object")
    entries = [_entry(path, number, 8 + length, name, record) for name, record in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.size_bytes))
    at = 8 + length
    for entry in entries:
        if entry.begin != at:
            _damaged(path, f"tensor {entry.name!r} begins at byte {entry.begin} instead of {at}")
        at += entry.size_bytes
    if at != size:
        _damaged(path, f"it has {size} bytes, but its header describes {at}")
    return entries


def _entry(path: Path, number: int, data: int, name: str, record: object) -> TensorEntry:
    """Check one header record; `data` is the byte at which tensor data begins."""
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"tensor {name[:120]!r} has no dtype, shape and data_offsets")
    stored, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(stored, str) or stored not in _DTYPES:
        _damaged(path, f"tensor {name[:120]!r} has the unknown dtype {str(stored)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        _damaged(path, f"tensor {name[:120]!r} has the shape {str(shape)[:120]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _damaged(path, f"tensor {name[:120]!r} has the offsets {str(offsets)[:120]}")
    item_bytes, dtype = _DTYPES[stored]
    size_bytes = math.prod(shape) * item_bytes
    if offsets[1] - offsets[0] != size_bytes:
        _damaged(
            path,
            f"tensor {name[:120]!r} of shape {shape} and dtype {stored} needs {size_bytes} bytes,"
            f" but its offsets are {offsets}",
        )
    shape = tuple(shape)
    return TensorEntry(name, number, data + offsets[0], size_bytes, stored, dtype, shape)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in record if names.count(name) > 1)
            _damaged(path, f"{twice[:120]!r} is there twice")
        return record

    values = text.count(b",") + text.count(b"{") + text.count(b"[")
    if values > MAX_JSON_VALUES + 3 * MAX_TENSORS:
        _damaged(path, f"it has {values} values, but at most {MAX_JSON_VALUES} are read")
    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"it is not readable JSON ({str(error)[:120]})")
    if not isinstance(record, dict):
        _damaged(path, "it is not a JSON object")
    return record


def _damaged(path: Path, what: str) -> NoReturn:
    raise ModelFilesError(f"{path.name}: {what}.", _AGAIN)
