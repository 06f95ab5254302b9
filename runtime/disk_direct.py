"""Reads that leave the page cache alone: whole experts, past everybody else's cached files.

What is read into RAM by us would only lie there twice. Where the system has no such reads, the
pages are given back right after an ordinary one.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIGN_BYTES = 4096
BOUNCE_BYTES = 4 * 2**20
_SAMPLES = 32
_HOT_SHARE = 0.9
_POSIX: Any = os
_own = threading.local()


class DirectFile:
    """A second descriptor of an open file, for reads past the page cache. Any thread may read."""

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno
        self._direct: int | None = None
        self._refused = False
        flag = getattr(os, "O_DIRECT", 0)
        if flag and sys.platform == "linux":
            try:
                # The same file for certain, even if another one has its name by now.
                self._direct = os.open(f"/proc/self/fd/{fileno}", os.O_RDONLY | flag)
            except OSError:  # a file system without them, such as one in memory
                self._direct = None

    @property
    def direct(self) -> bool:
        """Whether reads really go past the page cache."""
        return self._direct is not None and not self._refused

    def read_at(self, buffers: Sequence[memoryview], at: int) -> int:
        """Read some bytes from position `at`, as `preadv` does; 0 at the end of the file.

        Raises:
            OSError: the file cannot be read.
        """
        direct = self._direct
        if direct is None or self._refused:
            return self._read_ordinarily(buffers, at)
        begin = at // ALIGN_BYTES * ALIGN_BYTES
        skip = at - begin
        wanted = min(sum(map(len, buffers)), BOUNCE_BYTES - skip)
        bounce = _bounce()
        length = -(-(skip + wanted) // ALIGN_BYTES) * ALIGN_BYTES
        try:
            got: int = _POSIX.preadv(direct, [memoryview(bounce)[:length]], begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A file system may take the flag and refuse such reads all the same. The descriptor
            # stays open until `close`: another thread may be reading with it.
            self._refused = True
            return self._read_ordinarily(buffers, at)
        count = max(0, min(wanted, got - skip))
        done = 0
        for buffer in buffers:
            size = min(len(buffer), count - done)
            # numpy lets other threads run meanwhile; slices of memory views do not.
            source = np.frombuffer(bounce, dtype=np.uint8, count=size, offset=skip + done)
            np.copyto(np.frombuffer(buffer, dtype=np.uint8, count=size), source)
            done += size
        return count

    def _read_ordinarily(self, buffers: Sequence[memoryview], at: int) -> int:
        count: int = _POSIX.preadv(self._fileno, buffers, at)
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None and count:
            advise(self._fileno, at, count, _POSIX.POSIX_FADV_DONTNEED)
        return count

    def close(self) -> None:
        """Close the descriptor of our own; safe to call twice."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


class DirectFiles:
    """Several open files, read past the page cache. Any thread may read."""

    def __init__(self, files: Sequence[io.FileIO]) -> None:
        self._files = tuple(files)
        self._direct = [DirectFile(file.fileno()) for file in files]
        self._seen = [_version(file) for file in files]

    def read_at(self, number: int, buffers: Sequence[memoryview], at: int) -> int:
        """Read some bytes of file `number` from position `at`; 0 at its end.

        Raises:
            OSError: the file cannot be read.
            ValueError: it was changed since this record was made.
        """
        if _version(self._files[number]) != self._seen[number]:
            raise ValueError("it was changed while the model is loaded")
        return self._direct[number].read_at(buffers, at)

    def close(self) -> None:
        """Close the descriptors of our own; safe to call twice."""
        for direct in self._direct:
            direct.close()


def is_cached(file: io.FileIO) -> bool:
    """Say whether nearly all of a file is in the page cache, from a few samples of it."""
    fileno, size_bytes = file.fileno(), os.fstat(file.fileno()).st_size
    nowait = getattr(os, "RWF_NOWAIT", 0)
    if not nowait or size_bytes < ALIGN_BYTES:
        return False
    page = bytearray(1)
    hot = 0
    for number in range(_SAMPLES):
        try:
            hot += _POSIX.preadv(fileno, [page], size_bytes * number // _SAMPLES, nowait)
        except OSError:  # not there without waiting, or no such reads here
            continue
    return hot >= _HOT_SHARE * _SAMPLES


def _version(file: io.FileIO) -> tuple[int, int]:
    seen = os.fstat(file.fileno())
    return seen.st_size, seen.st_mtime_ns


def _bounce() -> mmap.mmap:
    """Return this thread's buffer for reads that must begin at a page."""
    bounce: mmap.mmap | None = getattr(_own, "bounce", None)
    if bounce is None:
        bounce = _own.bounce = mmap.mmap(-1, BOUNCE_BYTES)
    return bounce
