"""Filling a store: a few readers at a time, each expert straight into its place."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError

LOAD_READERS = min(4, max(2, os.cpu_count() or 2))
"""More than there are cores would only take turns at unpacking; more than four gain no disk."""
_LOOK_S = 0.05
"""How often a person who cancels is looked for."""
_STEPS = 400
"""Progress is told about so often in all."""


@dataclass(frozen=True)
class Job:
    """An expert of `size_bytes` to read into place number `place`."""

    expert: ExpertId
    place: int
    size_bytes: int


class Loading:
    """Reads jobs in their order; `stopped` is set once nothing more shall be read."""

    def __init__(
        self,
        read: Callable[[Job], None],
        need: Callable[[int], None],
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.stopped = threading.Event()
        self._read = read
        self._need = need
        self._progress = progress
        self._cancelled = cancelled
        self._done_bytes = 0

    def run(self, jobs: Sequence[Job], layers: int) -> None:
        """Read all jobs; `need` is asked for the memory of so many places before they are read.

        Raises:
            ModelFilesError: a file cannot be read to the end.
            CancelledError: `cancelled` said so; nothing is being read any more.
        """
        total_bytes = sum(job.size_bytes for job in jobs)
        said_bytes = -1
        under_way: deque[tuple[Job, Future[None]]] = deque()
        with ThreadPoolExecutor(LOAD_READERS, "prescope-load") as readers:
            try:
                for job in jobs:
                    self._check()
                    if (self._done_bytes - said_bytes) * _STEPS >= total_bytes or said_bytes < 0:
                        said_bytes = self._done_bytes
                        text = f"Reading the experts of layer {job.expert.layer + 1} of {layers}"
                        self._progress(LoadProgress(text, said_bytes, total_bytes))
                    self._need(job.place + 1)
                    under_way.append((job, readers.submit(self._read, job)))
                    if len(under_way) >= 2 * LOAD_READERS:
                        self._take(*under_way.popleft())
                while under_way:
                    self._take(*under_way.popleft())
            except BaseException:
                self.stopped.set()
                for _, future in under_way:
                    future.cancel()
                raise
        self._progress(LoadProgress("All experts are in memory", total_bytes, total_bytes))

    def _take(self, job: Job, future: Future[None]) -> None:
        while not future.done():
            self._check()
            wait([future], _LOOK_S)
        error = future.exception()
        if error is not None:
            # Its frames hold on to the memory that is about to be given back.
            error.__cause__ = error.__context__ = None
            raise error.with_traceback(None)
        self._done_bytes += job.size_bytes

    def _check(self) -> None:
        if self._cancelled():
            raise CancelledError("Loading was stopped.")
