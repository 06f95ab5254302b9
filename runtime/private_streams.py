"""What a process does before it speaks frames or JSON on its standard streams.

Any library may print. Both streams are moved to private descriptors first, so that a stray print
lands in the log and cannot corrupt what another program parses.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from runtime.wire import Frame, encode_frame, write_all

OOM_SCORE = "800"
EXIT_APP_GONE = 0
EXIT_PROTOCOL = 4
EXIT_DEVICE_LOST = 5

log = logging.getLogger("prescope.host")


class Pipe:
    """The way to the app. Any thread may send; a vanished app ends the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, frame: Frame) -> None:
        data = encode_frame(frame)
        with self._lock:
            try:
                write_all(self._descriptor, data)
            except OSError:
                leave(EXIT_APP_GONE)


def leave(code: int) -> NoReturn:
    """End the process now, whatever its other threads are doing."""
    os._exit(code)


def take_standard_streams() -> tuple[int, int]:
    """Move standard input and output to private descriptors and return them.

    Afterwards standard input is empty and everything printed goes to standard error.
    """
    read_from, write_to = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        for descriptor in (read_from, write_to):
            msvcrt.setmode(descriptor, os.O_BINARY)
    return read_from, write_to


@contextmanager
def private_output() -> Iterator[Callable[[bytes], None]]:
    """Yield a way to write to the real standard output; everything else goes to standard error."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda data: write_all(private, data)
    finally:
        sys.stdout.flush()
        os.dup2(private, 1)
        os.close(private)


def volunteer_for_oom_kill() -> None:
    """If memory runs out, let Linux end this process rather than the app or the browser."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
                score.write(OOM_SCORE)
        except OSError as failure:
            log.info("oom_score_adj stays: %s", failure)
