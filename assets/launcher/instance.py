"""One PreScope per data folder, judged by locks that die with their process, never by pids."""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from assets.launcher.places import Places, quietly, read_json

if sys.platform == "win32":
    import msvcrt

    def take(file: BinaryIO, shared: bool) -> bool:
        """Windows has no shared kind here: a shared lock somebody else has counts as taken."""
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return shared
        return True
else:
    import fcntl

    def take(file: BinaryIO, shared: bool) -> bool:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


HEALTH_TIMEOUT_S = 2.0


class FileLock:
    """A lock on a file, held until `release` or the end of the process, even by kill -9.

    `shared` locks exclude only exclusive ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def acquire(self, shared: bool = False) -> bool:
        """Whether the lock is ours now; never waits."""
        file = self.path.open("a+b")
        if not take(file, shared):
            file.close()
            return False
        self._file = file
        return True

    def keep_across_exec(self) -> None:
        """The program this process turns into goes on holding the lock."""
        if self._file is not None:
            os.set_inheritable(self._file.fileno(), True)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class RunningApp:
    """What a healthy app wrote about itself."""

    port: int
    token: str
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?t={self.token}"

    def is_healthy(self) -> bool:
        return answers(f"http://127.0.0.1:{self.port}/healthz")


def read_app(places: Places) -> RunningApp | None:
    """The app's own record, complete or not at all; it says nothing about whether it still runs."""
    record = read_json(places.app_file)
    port, token, pid = record.get("port"), record.get("token"), record.get("pid")
    if isinstance(port, int) and isinstance(token, str) and isinstance(pid, int):
        return RunningApp(port, token, pid)
    return None


def answers(url: str) -> bool:
    """Whether something on this computer answers 200; the system's proxy is not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, HTTPException):
        return False


def other_instance(places: Places, patience_s: float = 10.0) -> str | None:
    """The address to open when another launcher holds the lock: its app, or its progress page.

    None when that launcher went away meanwhile, or shows nothing within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    lock = FileLock(places.run / "launcher.lock")
    while True:
        app = read_app(places)
        if app is not None and app.is_healthy():
            return app.url
        page = read_json(places.page_file).get("url")
        if isinstance(page, str) and answers(page):
            return page
        if lock.acquire():
            lock.release()
            return None
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def clear_stale(places: Places, patience_s: float = 15.0) -> None:
    """Called with the lock held: whatever the files say is from a launcher that is gone.

    An app whose launcher was killed notices by itself and leaves; it is given the time, because
    two apps must not write one history.
    """
    app = read_app(places)
    deadline = time.monotonic() + patience_s
    while app is not None and app.is_healthy() and time.monotonic() < deadline:
        time.sleep(0.1)
        app = read_app(places)
    for file in (places.app_file, places.page_file):
        quietly(lambda file=file: file.unlink(missing_ok=True))  # type: ignore[misc]
