"""How GGUF files are named: which of them are models, and which are parts of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)
_PROJECTOR = "mmproj"  # Sees images for a model; no model itself.


def part_of(name: str) -> tuple[str, int, int] | None:
    """Return stem, number from 1, and count of parts that a file's name tells, or None."""
    match = _PART.fullmatch(name)
    return None if match is None else (match["stem"], int(match["number"]), int(match["parts"]))


def part_names(stem: str, parts: int) -> list[str]:
    """Return the names of all parts of a model, in order."""
    return [f"{stem}-{number + 1:05d}-of-{parts:05d}{SUFFIX}" for number in range(parts)]


def models_among(paths: Iterable[Path]) -> list[Path]:
    """Return the GGUF files that a model begins with: whole ones, and one part of each other."""
    firsts: dict[object, Path] = {}
    for path in sorted(paths):
        if path.suffix == SUFFIX and not path.name.startswith(_PROJECTOR):
            part = part_of(path.name)
            firsts.setdefault(path.name if part is None else (part[0], part[2]), path)
    return list(firsts.values())


def model_stem(name: str) -> str:
    """Return what a person calls the model in a file of this name."""
    part = part_of(name)
    return part[0] if part else name.removesuffix(SUFFIX)
