"""How much RAM this process may use, control groups included, and giving some back. No torch."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil

from runtime.profiles import Memory

MOST_PLAUSIBLE_BYTES = 2**46


def is_plausible(memory: Memory) -> bool:
    """Say whether both figures are whole bytes with 0 <= free <= total, and total not absurd."""
    return (
        type(memory.total_bytes) is int
        and type(memory.free_bytes) is int
        and 0 < memory.total_bytes <= MOST_PLAUSIBLE_BYTES
        and 0 <= memory.free_bytes <= memory.total_bytes
    )


def read_ram(root: Path = Path("/")) -> Memory:
    """Return the RAM this process may use: the machine's, or its control group's if that is less.

    `root` is where /proc and /sys are found.
    """
    try:
        machine = psutil.virtual_memory()
    except (OSError, RuntimeError, psutil.Error):
        return Memory(0, 0)
    total, free = int(machine.total), int(machine.available)
    for limit, used in _control_groups(root):
        total = min(total, limit)
        free = min(free, max(limit - used, 0))
    memory = Memory(total, min(free, total))
    return memory if is_plausible(memory) else Memory(0, 0)


def give_back_memory() -> None:
    """Return to the system what nobody holds any more, where the C library keeps it for later.

    What a load needs for a moment in each of its threads may be a hundred megabytes.
    """
    gc.collect()  # modules and caches refer to each other
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only in the GNU C library
        if trim is not None:
            trim(0)


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of every memory control group this process is under."""
    found = []
    for base, path in _group_folders(root):
        for folder in (base / path, *(base / path).parents):
            if not folder.is_relative_to(base):
                break
            limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
            if limit is not None and used is not None and 0 < limit < MOST_PLAUSIBLE_BYTES:
                # Cached file pages count as used, but go when memory is wanted.
                found.append((limit, max(used - _inactive_file_bytes(folder), 0)))
    return found


def _group_folders(root: Path) -> list[tuple[Path, str]]:
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = ["0::/"]
    folders = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            folders.append((base, path.lstrip("/")))
        elif "memory" in controllers.split(","):
            folders.append((base / "memory", path.lstrip("/")))
    return folders


def _number(*paths: Path) -> int | None:
    for path in paths:
        try:
            return int(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _inactive_file_bytes(folder: Path) -> int:
    try:
        pairs = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(pairs.get("total_inactive_file", pairs.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0
