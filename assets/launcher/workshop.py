"""What every step of an installation works with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from assets.launcher.children import Children, clean_environ
from assets.launcher.environment import LOCK_FOLDER
from assets.launcher.faults import MAKE_ROOM, FolderFault
from assets.launcher.places import Places
from assets.launcher.report import Report

# pip's options: nothing is resolved, nothing is built, nothing but the locked file is accepted.
PINNED_ONLY = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
# Compiling every module takes longer than compiling those that are used, when they are.
QUICKLY = ["--no-compile", "--progress-bar=off", "--no-warn-script-location"]


@dataclass(frozen=True)
class Workshop:
    """The folders, the voice, the leash and the lock of one installation."""

    places: Places
    report: Report
    children: Children
    lock_folder: Path = LOCK_FOLDER

    @property
    def environ(self) -> dict[str, str]:
        return clean_environ(os.environ, self.places.data)

    def run(
        self,
        python: Path | str,
        module: str,
        arguments: list[str],
        on_line: Callable[[str], None] | None = None,
        extra: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, list[str]]:
        """Exit status and last lines; every line goes to the log unless `on_line` takes it."""
        environ = {**self.environ, **(extra or {})}
        say = on_line or self.report.log_only
        return self.children.run(python, module, arguments, environ, say, timeout_s)

    def check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self.places.data).free
        if free < needed_bytes:
            raise FolderFault(
                f"{self.places.data} has {free / 1e9:.2f} GB of free space; installing needs "
                f"{needed_bytes / 1e9:.2f} GB.",
                MAKE_ROOM,
            )
