"""Every check a change must pass, in the environment the app runs in. `launcher.py test` runs it.

Without arguments: ruff, formatting, types, then all tests; every one runs even if one before it
failed. With arguments: only pytest, given those.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

CHECKS: tuple[tuple[str, ...], ...] = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)


def main(arguments: Sequence[str]) -> int:
    """Zero if everything passed. pytest comes last, so that its closing line is the last line."""
    if arguments:
        return run("pytest", *arguments)
    failed = [check for check in CHECKS if run(*check)]
    if failed:
        names = ", ".join(" ".join(check) for check in failed)
        print(f"== failed before pytest: {names}", flush=True)
    status = run("pytest")
    return status or (1 if failed else 0)


def run(*check: str) -> int:
    print(f"== {' '.join(check)}", flush=True)
    return subprocess.run([sys.executable, "-m", *check], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
