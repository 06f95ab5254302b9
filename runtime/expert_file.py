"""Experts as they were quantised once, in one flat file: written beside, resumed, checked on read.

Layout (little-endian): preamble and JSON header (`runtime.expert_file_header`); at the next block
boundary a table of 8 bytes per expert, whether it is there and its CRC-32; at the next one the
experts, layer by layer in slot layout, each at a multiple of 4096 bytes so that direct reads work.

While it is written the table is the journal: an expert's entry follows its bytes, and whoever
resumes checks the bytes against it, so that neither kill -9 nor a power cut can leave a wrong
expert behind. CRC-32 finds damage; it is no defence against somebody who may write these files.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from runtime.core import ExpertId
from runtime.disk_direct import is_cached
from runtime.errors import DiskError, ModelFilesError
from runtime.expert_file_blocks import Blocks, places, write_at
from runtime.expert_file_header import (
    ExpertFileHeader,
    encode_preamble,
    partial_path,
    read_start,
    take_lock,
    what_differs,
)

SPARE_PERCENT = 5
_FADVISE: Any = getattr(os, "posix_fadvise", None)


class ExpertFile:
    """A finished file, open for reading. Any thread may read; `close` once nobody does.

    While it is open, no other process deletes it.
    """

    def __init__(self, path: Path, header: ExpertFileHeader, blocks: Blocks) -> None:
        self.path = path
        self.header = header
        self.places = blocks.places
        self._blocks = blocks

    def read(self, expert: ExpertId, into: memoryview) -> None:
        """Fill `into`, format.size_bytes writable bytes, with one expert.

        Its checksum is compared the first time it is read from here.

        Raises:
            ModelFilesError: the file is damaged there or cannot be read.
        """
        if not self._blocks.read(expert, into):
            raise ModelFilesError(
                f"{self.path.name} is damaged: expert {expert.expert} of MoE layer {expert.layer}"
                " is not what was written.",
                "Load the model again: the damaged experts are made anew.",
            )

    def read_past_cache(self, on: bool) -> None:
        """Read directly, or through the page cache: the better way only for what lies there now."""
        self._blocks.read_past_cache(on)

    @property
    def cached(self) -> bool:
        """Whether nearly all of the file is in the page cache."""
        return is_cached(self._blocks.file)

    def heal(self, expert: ExpertId, data: memoryview) -> bool:
        """Write a damaged expert again, made anew; False if it is not the one that was lost.

        Raises:
            DiskError: the file cannot be written.
        """
        if zlib.crc32(data) != self._blocks.crc(expert):
            return False
        try:
            with open(self.path, "r+b", buffering=0) as file:
                write_at(file, data, self.places.offset(expert))
                os.fsync(file.fileno())
        except OSError as error:
            _refused(self.path, error)
        return True

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._blocks.read_past_cache(False)
        self._blocks.file.close()


def open_expert_file(path: Path, wanted: ExpertFileHeader) -> tuple[ExpertFile | None, str]:
    """Return the file at `path` if it is whole and has the header `wanted`, else why it is ignored.

    There is no reason if there is no file. Its start and its table are checked here, each expert
    when it is read.
    """
    try:
        file = open(path, "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        return None, _ignored(path, f"it cannot be opened ({error.strerror})")
    try:
        if not take_lock(file, shared=True):
            raise ValueError("it is just being deleted")
        header, table_crc = read_start(file)
        different = what_differs(header, wanted)
        if different:
            raise ValueError(different)
        place = places(wanted)
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != place.size_bytes:
            raise ValueError(f"it has {size_bytes:,} bytes instead of {place.size_bytes:,}")
        blocks = Blocks(file, wanted, place)
        if not blocks.whole(table_crc):
            raise ValueError("its table of checksums is damaged")
    except (OSError, ValueError) as error:
        file.close()
        return None, _ignored(path, str(error))
    return ExpertFile(path, wanted, blocks), ""


class ExpertFileWriter:
    """A file on its way. One thread uses it, and ends it with `finish`, `close` or `discard`.

    What an earlier writer with the same header left behind is taken up again: `read` tells whether
    an expert is there. `close` leaves what there is for the next time.

    Raises:
        DiskError: there is no room for the file, or its folder cannot be written.
    """

    def __init__(self, path: Path, header: ExpertFileHeader) -> None:
        self.path = path
        self.header = header
        self.places = places(header)
        self._partial = partial_path(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = _open_alone(self._partial)
        except OSError as error:
            _refused(self._partial, error)
        self._blocks = Blocks(file, header, self.places)
        self._unsynced = self.places.data_at
        try:
            resumed = self._fits()
            if not resumed:
                file.truncate(0)  # what is no use gives its space back before it is counted
            self._check_space(self._blocks.there_bytes() if resumed else 0)
            if not resumed:
                self._begin()
        except OSError as error:
            self.discard()
            _refused(self._partial, error)
        except DiskError:
            self.discard()
            raise

    def read(self, expert: ExpertId, into: memoryview) -> bool:
        """Fill `into` with an expert that was written before; False if it was not, or is damaged.

        Raises:
            DiskError: the file cannot be read.
        """
        try:
            return self._blocks.read(expert, into)
        except ModelFilesError as error:
            raise DiskError(error.message, "Check the disk.") from error

    def write(self, expert: ExpertId, data: memoryview) -> None:
        """Write one expert, then its entry in the table.

        Raises:
            DiskError: the disk is full or broken; what was written is deleted.
        """
        try:
            write_at(self._blocks.file, data, self.places.offset(expert))
            self._blocks.enter(expert, zlib.crc32(data))
        except OSError as error:
            self.discard()
            _refused(self._partial, error)

    def sync(self) -> None:
        """Bring what was written since the last call to the disk and out of the page cache.

        After every layer: so a power cut costs one layer, and RAM does not fill with copies.

        Raises:
            DiskError: the disk is full or broken; what was written is deleted.
        """
        try:
            descriptor = self._blocks.file.fileno()
            os.fsync(descriptor)
            if _FADVISE is not None:
                _FADVISE(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self.discard()
            _refused(self._partial, error)

    def finish(self) -> ExpertFile:
        """Give the file its name and return it open for reading; every expert must be there.

        Raises:
            DiskError: the disk is full or broken; what was written is deleted.
        """
        blocks = self._blocks
        assert blocks.missing() == 0, f"{blocks.missing()} experts were never written"
        try:
            crc = blocks.table_crc()
            write_at(blocks.file, encode_preamble(self.header.encoded(), crc), 0)
            os.fsync(blocks.file.fileno())
            blocks.file.close()  # Windows renames no open file
            os.replace(self._partial, self.path)
        except OSError as error:
            self.discard()
            _refused(self._partial, error)
        with suppress(OSError):  # without it, a power cut at worst brings the old name back
            _sync_folder(self.path.parent)
        finished, why = open_expert_file(self.path, self.header)
        if finished is None:
            raise DiskError(why or f"{self.path.name} is gone.", "Load the model again.")
        return finished

    def close(self) -> None:
        """Stop writing; what is there stays, to be taken up again. Safe to call twice."""
        self._blocks.file.close()

    def discard(self) -> None:
        """Stop writing and delete what there is."""
        self._blocks.file.close()
        with suppress(OSError):
            self._partial.unlink()

    def _fits(self) -> bool:
        """Say whether the file holds the beginnings of what is wanted."""
        try:
            header, _ = read_start(self._blocks.file)
        except ValueError:
            return False
        size_bytes = os.fstat(self._blocks.file.fileno()).st_size
        if what_differs(header, self.header) or size_bytes != self.places.size_bytes:
            return False
        self._blocks.load_table()
        write_at(self._blocks.file, encode_preamble(header, 0), 0)
        return True

    def _begin(self) -> None:
        file = self._blocks.file
        header = self.header.encoded()
        write_at(file, encode_preamble(header, 0) + header, 0)
        file.truncate(self.places.size_bytes)

    def _check_space(self, there_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self.path.parent).free
        needed_bytes = self.places.size_bytes - there_bytes
        needed_bytes += needed_bytes * SPARE_PERCENT // 100
        if needed_bytes > free_bytes:
            raise DiskError(
                f"Keeping the {self.header.kind} experts of {self.header.model} needs"
                f" {_size(needed_bytes)} on the disk of {self.path.parent}"
                f" ({SPARE_PERCENT} % of them to spare), and {_size(free_bytes)} are free.",
                f"Free {_size(needed_bytes - free_bytes)} there, or delete kept experts"
                " in the settings.",
            )


def _open_alone(path: Path) -> io.FileIO:
    """Open a file for reading and writing, made if need be, that no other process writes.

    Raises:
        OSError: another one does, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    file = io.FileIO(descriptor, "r+b")
    ours = take_lock(file, shared=False)
    # A writer that just finished has renamed what was opened here.
    if not ours or not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        file.close()
        raise BlockingIOError(errno.EAGAIN, "another PreScope is writing it")
    return file


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, error: OSError) -> NoReturn:
    next_step = "Check the disk, and that its folder can be written."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        next_step = "Free some of that disk, or delete kept experts in the settings."
    elif error.errno == errno.EAGAIN:
        next_step = "Wait for the other PreScope, or close it."
    raise DiskError(
        f"Quantised experts cannot be kept in {path}: {error.strerror or error}.", next_step
    ) from error


def _ignored(path: Path, why: str) -> str:
    return f"The kept experts in {path.name} are not used: {why}."


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"
