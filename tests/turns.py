"""Who may run beside whom, between the worker processes of one run.

An ordinary test goes through the door and stays in the room, beside others. One that has to be
alone keeps the door shut, so that the room empties in the end, and waits until it has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from assets.launcher.instance import FileLock

WAITS_WITHIN_S = 600.0
LOOKS_EVERY_S = 0.005


@contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """Hold this process's place among the others that use `folder`."""
    door, room = FileLock(folder / "door"), FileLock(folder / "room")
    try:
        acquire(door)
        acquire(room, shared=not alone)
        if not alone:
            door.release()
        yield
    finally:
        room.release()
        door.release()


def acquire(lock: FileLock, shared: bool = False) -> None:
    deadline_s = time.monotonic() + WAITS_WITHIN_S
    while not lock.acquire(shared):
        assert time.monotonic() < deadline_s, f"the test in {lock.path} does not end"
        time.sleep(LOOKS_EVERY_S)
