"""Whether a model's files are what their publisher meant: sha256, wherever one is known.

The safetensors format has no checksum, so a flipped bit loads like any other. A digest is known
from a `.sha256` file beside the file or from what the hub's own downloader left there. A file is
hashed once and again only after it changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.core import LoadProgress
from runtime.errors import CancelledError, ModelFilesError
from runtime.gguf_names import part_names, part_of
from runtime.safetensors_files import open_regular

RECORD_VERSION = 1
_PIECE_BYTES = 4 * 2**20
_THREADS = 4
_MAX_PARTS = 1000
_LATER_S = 1.0
_SUFFIXES = (".safetensors", ".gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NOTE_BYTES = 4096
_AGAIN = "Download this file again, or choose another model."


@dataclass(frozen=True)
class _File:
    """A file whose digest is known; `state` changes when the file does."""

    path: Path
    expected: str
    state: tuple[int, int]


def verify_files(
    model: Path,
    record: Path,
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
) -> int:
    """Compare the weights of `model`, a folder or file, with their known digests.

    `record` is the file in which digests are remembered from one load to the next.

    Returns:
        How many files were found to be as published; 0 where nothing is known.

    Raises:
        ModelFilesError: a file is damaged, or cannot be read.
        CancelledError: `cancelled` returned True.
    """
    files = _known_files(model)
    remembered = _remembered(record)
    fresh = [file for file in files if _key(file) not in remembered]

    def made(file: _File, digest: str) -> None:
        remembered[_key(file)] = digest
        _remember(record, remembered)

    if fresh:
        _hash(fresh, made, progress, cancelled)
    for file in files:
        found = remembered[_key(file)]
        if found != file.expected:
            raise ModelFilesError(
                f"{file.path.name} is damaged: its sha256 is {found[:16]}..., and it was published"
                f" with {file.expected[:16]}....",
                _AGAIN,
            )
    return len(files)


def known_digest(path: Path) -> str | None:
    """Return the sha256 that a file should have, None where nobody says."""
    beside = _note(path.with_name(path.name + ".sha256"))
    words = [beside.split(maxsplit=1)[:1], _downloaded(path)]
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        words.append([path.resolve().name])  # its cache names large files by their digest
    for word in words:
        digest = word[0].strip().strip('"').lower() if word else ""
        if _SHA256.fullmatch(digest):
            return digest
    return None


def _downloaded(path: Path) -> list[str]:
    """Return the digest that the hub's downloader left of a file in a plain folder, if it holds.

    Its note says commit, digest and time; a file saved again after that time is another one.
    """
    note = _note(path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata")
    lines = note.splitlines()
    try:
        if path.stat().st_mtime > float(lines[2]) + _LATER_S:
            return []
    except (OSError, ValueError, IndexError):
        return []
    return lines[1:2]


def _paths_of(model: Path) -> list[Path]:
    """Return every file that may hold weights of `model`: all parts, where one part is given."""
    if model.is_dir():
        return sorted(model.iterdir())
    part = part_of(model.name)
    if part is None or part[2] > _MAX_PARTS:
        return [model]
    return [model.with_name(name) for name in part_names(part[0], part[2])]


def _known_files(model: Path) -> list[_File]:
    paths = _paths_of(model)
    files = []
    for path in paths:
        expected = known_digest(path) if path.suffix in _SUFFIXES and path.is_file() else None
        if expected is not None:
            found = path.stat()
            files.append(_File(path, expected, (found.st_size, found.st_mtime_ns)))
    return files


def _note(path: Path) -> str:
    if not path.is_file():
        return ""
    with open_regular(path) as file:
        return (file.read(_MAX_NOTE_BYTES) or b"").decode("utf-8", errors="replace")


def _key(file: _File) -> str:
    size, changed_ns = file.state
    return f"{file.path.resolve()}|{size}|{changed_ns}"


def _hash(
    files: Sequence[_File],
    made: Callable[[_File, str], None],
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
) -> None:
    """Give the digest of each file to `made`, one call at a time, as soon as it is there."""
    counting = threading.Lock()
    total_bytes, done_bytes = sum(file.state[0] for file in files), 0
    ended = threading.Event()

    def digest(file: _File) -> None:
        nonlocal done_bytes
        summed = hashlib.sha256()
        buffer = bytearray(_PIECE_BYTES)
        try:
            with open_regular(file.path) as reader:
                while count := reader.readinto(buffer) or 0:
                    summed.update(memoryview(buffer)[:count])
                    with counting:
                        if ended.is_set() or cancelled():
                            raise CancelledError("Loading was stopped.")
                        done_bytes += count
                        text = "Checking the model's files"
                        progress(LoadProgress(text, done_bytes, total_bytes))
        except OSError as error:
            raise ModelFilesError(f"{file.path.name} cannot be read ({error}).", _AGAIN) from error
        with counting:
            made(file, summed.hexdigest())

    with ThreadPoolExecutor(_THREADS, "digests") as pool:
        futures = [pool.submit(digest, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            ended.set()
            raise


def _remembered(record: Path) -> dict[str, str]:
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    files = stored.get("files") if isinstance(stored, dict) else None
    if not isinstance(files, dict) or stored.get("version") != RECORD_VERSION:
        return {}
    return {key: digest for key, digest in files.items() if isinstance(digest, str)}


def _remember(record: Path, digests: dict[str, str]) -> None:
    """Write the record, without those of files that changed or went away.

    A disk that takes none only makes the files be hashed again next time.
    """
    kept = {}
    for key, digest in digests.items():
        try:
            path, size, changed_ns = key.rsplit("|", 2)
            found = os.stat(path)
        except (OSError, ValueError):
            continue
        if (str(found.st_size), str(found.st_mtime_ns)) == (size, changed_ns):
            kept[key] = digest
    fresh = record.with_name(record.name + ".new")
    text = json.dumps({"version": RECORD_VERSION, "files": kept}, indent=1)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(record)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
