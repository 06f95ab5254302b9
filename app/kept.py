"""Quantised experts that are kept on this disk: which there are, what they take, and deleting them.

Nothing of a file is believed but its label; a file that a model has open is not deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.models import printable
from runtime.errors import ConfigError
from runtime.expert_file_header import FOLDER, delete, kept_files


@dataclass(frozen=True)
class KeptOffer:
    """One line of the list. `name` is the file's, and what `KeptShelf.delete` takes."""

    name: str
    label: str
    kind: str
    size_bytes: int
    finished: bool


class KeptShelf:
    """Looks at the disk whenever asked; holds nothing but where to look."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / FOLDER

    def __call__(self) -> list[KeptOffer]:
        """Return what is kept, by name; never raises."""
        return [
            KeptOffer(
                kept.path.name,
                printable(kept.model) or "A file that cannot be read",
                printable(kept.kind),
                kept.size_bytes,
                kept.finished,
            )
            for kept in kept_files(self._folder)
        ]

    def delete(self, name: str) -> None:
        """Delete one file for good; one that is gone already is fine.

        Raises:
            BusyError: a loaded model reads it, or a load writes it.
            ConfigError: it cannot be deleted.
        """
        try:
            delete(self._folder, name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(
                f"{name} could not be deleted: {error.strerror or error}.",
                f"Check that {self._folder} can be written.",
            ) from error
