"""Where everything lies in an expert file, and its table of checksums: reading and writing it."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.core import ExpertId
from runtime.disk_direct import DirectFile
from runtime.errors import ModelFilesError
from runtime.expert_file_header import BLOCK_BYTES, ENTRY_BYTES, PREAMBLE, ExpertFileHeader

_ENTRY = struct.Struct("<II")
_THERE = 1
_PIECE_BYTES = 32 * 2**20
_PREADV = getattr(os, "preadv", None)  # Windows has neither of these.
_PWRITE = getattr(os, "pwrite", None)


@dataclass(frozen=True)
class Places:
    """Where everything lies in a file with a given header."""

    table_at: int
    data_at: int
    size_bytes: int
    first: tuple[int, ...]
    """the number of each layer's first expert, counted through all layers"""
    begin: tuple[int, ...]
    """the byte at which each layer's experts begin"""
    stride: tuple[int, ...]
    """the bytes from one expert of a layer to the next, whole blocks"""

    def number(self, expert: ExpertId) -> int:
        """Return the expert's place in the table."""
        return self.first[expert.layer] + expert.expert

    def offset(self, expert: ExpertId) -> int:
        """Return the byte at which the expert begins."""
        return self.begin[expert.layer] + expert.expert * self.stride[expert.layer]


def places(header: ExpertFileHeader) -> Places:
    """Lay a file out."""
    table_at = _up(PREAMBLE.size + len(header.encoded()))
    data_at = at = _up(table_at + header.expert_count * ENTRY_BYTES)
    first, begin, stride = [], [], []
    count = 0
    for layer in header.layers:
        first.append(count)
        begin.append(at)
        stride.append(_up(layer.format.size_bytes))
        count += layer.experts
        at += layer.experts * stride[-1]
    return Places(table_at, data_at, at, tuple(first), tuple(begin), tuple(stride))


class Blocks:
    """An open file, its places and its table in memory."""

    def __init__(self, file: io.FileIO, header: ExpertFileHeader, place: Places) -> None:
        self.file = file
        self.places = place
        self._sizes = [layer.format.size_bytes for layer in header.layers]
        self._table = bytearray(header.expert_count * ENTRY_BYTES)
        self._strides = [
            stride
            for stride, layer in zip(place.stride, header.layers, strict=True)
            for _ in range(layer.experts)
        ]
        self._checked = bytearray(header.expert_count)
        self._seeking = threading.Lock()
        self._direct: DirectFile | None = None

    def read_past_cache(self, on: bool) -> None:
        if on and self._direct is None and _PREADV is not None:
            self._direct = DirectFile(self.file.fileno())
        elif not on and self._direct is not None:
            self._direct.close()
            self._direct = None

    def load_table(self) -> None:
        self._read_at(memoryview(self._table), self.places.table_at)

    def whole(self, table_crc: int) -> bool:
        self.load_table()
        return table_crc == self.table_crc() and self.missing() == 0

    def table_crc(self) -> int:
        return zlib.crc32(self._table) or 1  # 0 stands for a file that is not finished

    def missing(self) -> int:
        return sum(there != _THERE for there, _ in self._entries())

    def there_bytes(self) -> int:
        entries = zip(self._entries(), self._strides, strict=True)
        return sum(stride for (there, _), stride in entries if there == _THERE)

    def crc(self, expert: ExpertId) -> int | None:
        """Return the checksum of an expert, None if it is not there."""
        there, crc = _ENTRY.unpack_from(self._table, self.places.number(expert) * ENTRY_BYTES)
        return crc if there == _THERE else None

    def enter(self, expert: ExpertId, crc: int) -> None:
        number = self.places.number(expert)
        _ENTRY.pack_into(self._table, number * ENTRY_BYTES, _THERE, crc)
        entry = memoryview(self._table)[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES]
        write_at(self.file, entry, self.places.table_at + number * ENTRY_BYTES)

    def read(self, expert: ExpertId, into: memoryview) -> bool:
        """Fill `into`; False if the expert is not there or not what was written."""
        assert len(into) == self._sizes[expert.layer], (expert, len(into))
        crc = self.crc(expert)
        if crc is None:
            return False
        try:
            self._read_at(into, self.places.offset(expert))
        except (OSError, ValueError) as error:
            raise ModelFilesError(
                f"Reading the kept expert {expert.expert} of MoE layer {expert.layer} failed:"
                f" {error}.",
                "Load the model again.",
            ) from error
        number = self.places.number(expert)
        if not self._checked[number]:
            if zlib.crc32(into) != crc:
                return False
            self._checked[number] = 1
        return True

    def _entries(self) -> Iterator[tuple[int, int]]:
        return _ENTRY.iter_unpack(self._table)

    def _read_at(self, buffer: memoryview, at: int) -> None:
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + _PIECE_BYTES]
            if self._direct is not None:
                count = self._direct.read_at([piece], at + done)
            elif _PREADV is not None:
                count = _PREADV(self.file.fileno(), [piece], at + done)
            else:
                with self._seeking:
                    self.file.seek(at + done)
                    count = self.file.readinto(piece) or 0
            if not count:
                raise ValueError(f"the file ends at byte {at + done:,}")
            done += count


def write_at(file: io.FileIO, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at byte `at`.

    Raises:
        OSError: the disk is full or refuses.
    """
    view = memoryview(data)
    done = 0
    while done < len(view):
        piece = view[done : done + _PIECE_BYTES]
        if _PWRITE is not None:
            done += _PWRITE(file.fileno(), piece, at + done)
        else:
            file.seek(at + done)
            done += file.write(piece)


def _up(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
