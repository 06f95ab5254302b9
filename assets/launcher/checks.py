"""Every check a change must pass, in the environment the app runs in. `launcher.py test` runs it.

Without arguments: ruff, formatting, types, then all tests, on as many processes as fit this
machine; every one runs even if one before it failed. With arguments: only pytest, given those.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import psutil

CHECKS: tuple[tuple[str, ...], ...] = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)
MOST_WORKERS = 4
WORKER_BYTES = 4 * 2**30
"""A worker holds torch and small models, and may hold an engine process and a browser."""


def main(arguments: Sequence[str]) -> int:
    """Zero if everything passed. pytest comes last, so that its closing line is the last line."""
    if arguments:
        return run("pytest", *arguments)
    failed = [check for check in CHECKS if run(*check)]
    if failed:
        names = ", ".join(" ".join(check) for check in failed)
        print(f"== failed before pytest: {names}", flush=True)
    cores = psutil.cpu_count() or 1
    status = run("pytest", *spread(workers(cores, psutil.virtual_memory().available)))
    return status or (1 if failed else 0)


def workers(cores: int, free_bytes: int) -> int:
    """How many test processes run side by side."""
    return max(1, min(cores, free_bytes // WORKER_BYTES, MOST_WORKERS))


def spread(workers: int) -> list[str]:
    """A file stays in one process, for what its tests share. Files begin in their own order: those
    of the browser and the launcher, which wait a lot, come first, and short ones last."""
    if workers == 1:
        return []
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


def run(*check: str) -> int:
    print(f"== {' '.join(check)}", flush=True)
    return subprocess.run([sys.executable, "-m", *check], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
