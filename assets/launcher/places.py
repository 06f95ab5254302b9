"""Where PreScope keeps things: one private data folder, whatever the system."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.launcher.faults import FolderFault, from_os_error

ROOT = Path(__file__).resolve().parents[2]
# torch's licence files reach 171 characters below site-packages, whose own path takes 19.
LONGEST_BELOW_ENVIRONMENT = 190
WINDOWS_PATH_LIMIT = 260


def default_data_folder(
    platform: str, environ: Mapping[str, str], home: Path, executable: str
) -> Path:
    """platformdirs' convention, by hand: the launcher has only the standard library."""
    if platform == "win32":
        if "WindowsApps" in executable:
            # Python from the Store sees a redirected AppData that no other program sees.
            return home / ".prescope"
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "PreScope"
    if platform == "darwin":
        return home / "Library" / "Application Support" / "PreScope"
    xdg = environ.get("XDG_DATA_HOME", "").strip()
    return (Path(xdg) if xdg else home / ".local" / "share") / "prescope"


def data_folder(argument: str | None) -> Path:
    chosen = argument or os.environ.get("PRESCOPE_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return default_data_folder(sys.platform, os.environ, Path.home(), sys.base_prefix)


@dataclass(frozen=True)
class Places:
    """The launcher's part of the data folder. The app keeps its own files beside these."""

    data: Path

    @property
    def run(self) -> Path:
        return self.data / "run"

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    @property
    def wheels(self) -> Path:
        return self.data / "wheels"

    @property
    def current(self) -> Path:
        """Names the environment in use; replaced in one step when a new one is verified."""
        return self.data / "current.json"

    @property
    def app_file(self) -> Path:
        """Written by the app once it is healthy: {"port", "token", "pid"}."""
        return self.run / "app.json"

    @property
    def page_file(self) -> Path:
        """Written by the launcher while its progress page is up: {"url"}."""
        return self.run / "page.json"

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    @property
    def app_log(self) -> Path:
        return self.logs / "app.log"

    def prepare(self) -> None:
        """Makes the folders, private to this person, and tries them. Leaves nothing half made."""
        self._refuse_impossible_paths()
        made = not self.data.exists()
        try:
            for folder in (self.data, self.run, self.logs):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.name != "nt":
                self.data.chmod(0o700)
            with tempfile.TemporaryFile(dir=self.data) as trial:
                trial.write(b"x" * 4096)
        except OSError as error:
            if made and self.data.is_dir():
                for folder in (self.run, self.logs, self.data):
                    quietly(folder.rmdir)
            raise from_os_error(f"The data folder {self.data} cannot be used", error) from error

    def _refuse_impossible_paths(self) -> None:
        if os.pathsep in str(self.data) and os.name != "nt":
            raise FolderFault(
                f"The data folder {self.data} has a '{os.pathsep}' in its path, which Python "
                "environments cannot have.",
                "Choose another folder with --data-dir or PRESCOPE_DATA_DIR.",
            )
        if self.data.exists() and not self.data.is_dir():
            raise FolderFault(
                f"The data folder {self.data} is a file.",
                "Choose another folder with --data-dir or PRESCOPE_DATA_DIR.",
            )
        longest = len(str(self.data)) + len("\\env-12345678") + LONGEST_BELOW_ENVIRONMENT
        if os.name == "nt" and longest > WINDOWS_PATH_LIMIT and not windows_long_paths():
            excess = longest - WINDOWS_PATH_LIMIT
            raise FolderFault(
                f"The data folder {self.data} is {excess} characters too deep for Windows' "
                f"{WINDOWS_PATH_LIMIT} character limit.",
                "Choose a shorter one, for example --data-dir C:\\PreScope.",
            )


def windows_long_paths() -> bool:
    """Whether this Windows lets programs pass the 260 character limit."""
    if sys.platform == "win32":
        try:
            return bool(ctypes.WinDLL("ntdll").RtlAreLongPathsEnabled())
        except (OSError, AttributeError):
            return False
    else:
        return True


def quietly(action: Callable[[], object]) -> None:
    """Tidying up that may fail without anybody having to know."""
    try:
        action()
    except OSError:
        return


def write_private_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces the file in one step; readers see the old record or the new one, never half."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    replace(beside, path)


def read_json(path: Path) -> dict[str, Any]:
    """The record in the file; an absent, half-written or foreign file reads as empty."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def replace(source: Path, target: Path, patience_s: float = 5.0) -> None:
    """os.replace, patient with antivirus programs that hold new files for a moment."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
