"""What an expert file says about itself, where such files lie, and which of them may go.

An expert file keeps the experts of one model as they were quantised on this machine, so that the
next load only reads. It begins with a preamble and a JSON header (this module), then a table with
a checksum per expert, then the experts in slot layout (`runtime.expert_file`). A file fits if its
header is, to the last byte, the one that would be written now: the same source files, the same
layout, the same quantiser. While it is written it has another name. No torch in here: the app
lists and deletes these files too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BusyError, ProtocolError
from runtime.formats import ExpertFormat
from runtime.wire import record_from_json

FOLDER = "experts"
SUFFIX = ".experts"
PARTIAL_SUFFIX = ".experts.partial"
FORMAT_VERSION = 1
MAGIC = b"PSEXPERT"
BLOCK_BYTES = 4096
MAX_HEADER_BYTES = 64 * 2**20
PREAMBLE = struct.Struct("<8sIIII")
"""magic, format version, bytes of the header, CRC-32 of the header, of the table (0: unfinished)"""
ENTRY_BYTES = 8
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class SourceFile:
    """One file of the checkpoint as it was when its experts were quantised."""

    name: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class LayerExperts:
    """How many experts a MoE layer has and how each of them lies."""

    experts: int
    format: ExpertFormat


@dataclass(frozen=True)
class ExpertFileHeader:
    """Whose experts these are and how they lie. `quantiser` names the arithmetic that made them."""

    model: str
    kind: str
    quantiser: str
    config_sha256: str
    sources: tuple[SourceFile, ...]
    layers: tuple[LayerExperts, ...]

    def encoded(self) -> bytes:
        """Return the header as it stands in a file; equal headers give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode("ascii")

    @property
    def expert_count(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def experts_bytes(self) -> int:
        """What the experts take in memory; in the file each is rounded up to whole blocks."""
        return sum(layer.experts * layer.format.size_bytes for layer in self.layers)


def describe_source(
    folder: Path,
    paths: Sequence[Path],
    *,
    model: str,
    kind: str,
    quantiser: str,
    layers: Sequence[LayerExperts],
) -> ExpertFileHeader:
    """Return the header for the model in `folder` with the weights in `paths`, as they are now.

    A shard is known by name, size and time of change: a shard edited in place by a program that
    sets its time back is not noticed.

    Raises:
        OSError: a file cannot be looked at.
    """
    config = folder / "config.json"  # a GGUF file has its configuration inside
    stamps = [(path.name, path.stat()) for path in paths]
    return ExpertFileHeader(
        model=model,
        kind=kind,
        quantiser=quantiser,
        config_sha256=hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else "",
        sources=tuple(SourceFile(name, s.st_size, s.st_mtime_ns) for name, s in stamps),
        layers=tuple(layers),
    )


def file_path(cache: Path, folder: Path, kind: str) -> Path:
    """Return where the experts of the model in `folder` are kept under `cache`.

    One place per model folder and kind, so that a changed model replaces its file.
    """
    folder = folder.resolve()
    stem = _UNPRINTABLE.sub("-", folder.name)[:60].strip("-.") or "model"
    mark = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return cache / f"{stem}.{mark}.{kind}{SUFFIX}"


def partial_path(path: Path) -> Path:
    """Return the name that the file at `path` has while it is written."""
    return path.with_name(path.name.removesuffix(SUFFIX) + PARTIAL_SUFFIX)


def encode_preamble(header: bytes, table_crc: int) -> bytes:
    """Return the first bytes of a file; `table_crc` 0 says that it is not finished."""
    return PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(header), zlib.crc32(header), table_crc)


def read_start(file: io.FileIO) -> tuple[bytes, int]:
    """Return the header's bytes and the table's CRC of an open file.

    Raises:
        ValueError: it is no expert file of this version, or its start is damaged; says which.
        OSError: it cannot be read.
    """
    file.seek(0)
    start = file.read(PREAMBLE.size)
    if len(start) < PREAMBLE.size or not start.startswith(MAGIC):
        raise ValueError("it is not an expert file")
    _, version, header_bytes, header_crc, table_crc = PREAMBLE.unpack(start)
    if version != FORMAT_VERSION:
        raise ValueError(f"its format is {version}, not {FORMAT_VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {header_bytes:,} bytes")
    header = file.read(header_bytes)
    if len(header) < header_bytes or zlib.crc32(header) != header_crc:
        raise ValueError("its header is damaged")
    return header, table_crc


def what_differs(found: bytes, expected: ExpertFileHeader) -> str:
    """Return in words why a file with the header `found` does not fit; empty if it does."""
    if found == expected.encoded():
        return ""
    try:
        record: Any = json.loads(found)
        given = {name: record[name] for name in asdict(expected)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return "its header cannot be understood"
    wanted = json.loads(expected.encoded())
    if given["quantiser"] != wanted["quantiser"]:
        return "it was quantised by another version of PreScope"
    if any(given[name] != wanted[name] for name in ("config_sha256", "sources")):
        return "the model's files have changed since it was made"
    return "its experts lie another way than they are wanted now"


@dataclass(frozen=True)
class KeptFile:
    """One line of the list of expert files. `finished` False: a load was broken off; it resumes.

    `model` is empty where the file cannot be read; it may still be deleted.
    """

    path: Path
    model: str
    kind: str
    size_bytes: int
    finished: bool


def kept_files(cache: Path) -> list[KeptFile]:
    """Return the expert files under `cache`, by name; never raises on what is in there."""
    return [_look_at(path) for path in sorted(_files(cache))]


def delete(cache: Path, name: str) -> None:
    """Delete one expert file that nothing has open.

    Raises:
        BusyError: a loaded model reads it or a load writes it.
        OSError: it cannot be deleted, or `cache` has no such file.
    """
    path = next((path for path in _files(cache) if path.name == name), None)
    if path is None:
        raise FileNotFoundError(f"There is no {name} in {cache}.")
    with open(path, "r+b", buffering=0) as file:
        if not take_lock(file, shared=False):
            raise BusyError(
                f"These experts are in use: a model is loaded from {name}.",
                "Load another model, or the same with its experts as stored, first.",
            )
        if sys.platform != "win32":
            path.unlink()
    if sys.platform == "win32":
        path.unlink()


def _files(cache: Path) -> Iterator[Path]:
    try:
        with os.scandir(cache) as entries:
            for entry in entries:
                known = entry.name.endswith((SUFFIX, PARTIAL_SUFFIX))
                if known and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)
    except OSError:
        return


def _look_at(path: Path) -> KeptFile:
    finished = path.name.endswith(SUFFIX)
    size_bytes, model, kind = 0, "", ""
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            # A file that is written has holes; what it takes on the disk is what counts.
            size_bytes = min(found.st_size, 512 * getattr(found, "st_blocks", found.st_size))
            header = record_from_json(ExpertFileHeader, json.loads(read_start(file)[0]))
            model, kind = header.model, header.kind
    except (OSError, ValueError, RecursionError, ProtocolError):
        pass
    return KeptFile(path, model, kind, size_bytes, finished)


if sys.platform == "win32":
    import msvcrt

    _FAR_AWAY = 2**62

    def take_lock(file: io.FileIO, *, shared: bool) -> bool:
        """Lock an open file until it is closed; False if another process has it.

        A file that is open cannot be deleted here, so readers need no lock.
        """
        if shared:
            return True
        file.seek(_FAR_AWAY)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            file.seek(0)
        return True
else:
    import fcntl

    def take_lock(file: io.FileIO, *, shared: bool) -> bool:
        """Lock an open file until it is closed; False if another process has it.

        Shared locks exclude only exclusive ones. A lock dies with its process.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
