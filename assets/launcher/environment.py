"""The private Python environment: is the right one there, and if not, building it beside.

    data/env-1a2b3c4d/    one environment; its name is the hash of what it was made from
    data/current.json     names the one in use; written last, in one step
    data/wheels/          large downloads until the environment that needs them is verified

An environment under construction is never touched up: an interrupted one is made anew from the
downloads, which are kept. The one in use is never written to by an update, and is removed only
when nothing runs in it any more.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.launcher.instance import FileLock
from assets.launcher.places import ROOT, Places, quietly, read_json, write_private_json

LOCK_FOLDER = ROOT / "assets" / "lock"
LOCK_FILES = ("pip.txt", "requirements.txt", "torch.txt")
SCHEMA = 1


def wanted_key(wanted: str, lock_folder: Path = LOCK_FOLDER, generation: int = 0) -> str:
    """Changes whenever the environment has to: the lock, the Python, the machine, the build. The
    generation counts how often the same was asked for again."""
    digest = hashlib.sha256()
    for name in LOCK_FILES:
        digest.update((lock_folder / name).read_bytes())
    about = (sys.version, sys.platform, platform.machine(), wanted, str(SCHEMA), str(generation))
    for part in about:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Environment:
    """One environment folder. `python` exists only once it was made."""

    folder: Path

    @property
    def python(self) -> Path:
        if os.name == "nt":
            return self.folder / "Scripts" / "python.exe"
        return self.folder / "bin" / "python"

    @property
    def test_mark(self) -> Path:
        """Holds the hash of the test tools' lock once they are installed."""
        return self.folder / "test-tools.sha256"

    def in_use(self) -> FileLock:
        """Held, shared, by whatever runs in this environment."""
        return FileLock(self.folder.with_name(self.folder.name + ".lock"))


def environment_for(places: Places, key: str) -> Environment:
    return Environment(places.data / f"env-{key[:8]}")


def current(
    places: Places, lock_folder: Path = LOCK_FOLDER, even_if_stale: bool = False
) -> Environment | None:
    """The environment to run in, if it is the one that today's lock and Python ask for.

    The build of torch is the one chosen when it was made; `PRESCOPE_TORCH` may ask for another. A
    stale one would still do, but the person or the computer wants it made again.
    """
    record = read_json(places.current)
    if record.get("stale") and not even_if_stale:
        return None
    wanted = os.environ.get("PRESCOPE_TORCH", "").strip().lower() or record.get("wanted")
    if not isinstance(wanted, str) or wanted != record.get("wanted"):
        return None
    if record.get("key") != wanted_key(wanted, lock_folder, generation(record)):
        return None
    found = environment_for(places, record["key"])
    return found if found.python.exists() else None


def generation(record: dict[str, Any]) -> int:
    number = record.get("generation", 0)
    return number if isinstance(number, int) else 0


def next_generation(places: Places) -> int:
    """For the environment about to be built: it must not be the folder of a stale one."""
    record = read_json(places.current)
    return generation(record) + (1 if record.get("stale") else 0)


def switch(places: Places, record: dict[str, Any]) -> None:
    """Puts a verified environment to use; a reader sees the old record or the new one. The record
    has at least `key`, `wanted` and `generation`."""
    write_private_json(places.current, {"schema": SCHEMA, **record})


def mark_stale(places: Places) -> None:
    """The next start chooses and builds again, beside the environment in use."""
    record = read_json(places.current)
    if record:
        write_private_json(places.current, {**record, "stale": True})


def remove_others(places: Places, keep: Environment, say: Callable[[str], None]) -> None:
    """Removes environments nothing runs in; those in use stay until a later start."""
    for folder in places.data.glob("env-*"):
        if folder == keep.folder or not folder.is_dir():
            continue
        lock = Environment(folder).in_use()
        if not lock.acquire():
            say(f"{folder.name} is still in use; it will be removed later.")
            continue
        remove_tree(folder)
        lock.release()
        quietly(lock.path.unlink)


def remove_tree(folder: Path) -> None:
    """Gone, or at least out of the way: on Windows a file somebody holds open cannot go."""
    if not folder.exists():
        return
    doomed = folder.with_name(folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        folder.rename(doomed)
    except OSError:
        doomed = folder
    shutil.rmtree(doomed, ignore_errors=True)
