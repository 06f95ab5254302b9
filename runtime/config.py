"""Where things are: the data folder and the folder of a model. The only reader of the environment.

Names come from outside, so a model name is looked up, never joined into a path unchecked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from runtime.errors import ConfigError, ModelFilesError
from runtime.gguf_names import SUFFIX, model_stem

DATA_DIR_VARIABLE = "PRESCOPE_DATA_DIR"
DEFAULT_MODEL = "default"
DEFAULT_MODEL_NAME = "PreScope Tiny"
DEFAULT_MODEL_DIR = Path(__file__).resolve().parent.parent / "assets" / "default_model"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


def data_dir(given: str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the data folder: the one given, else `PRESCOPE_DATA_DIR`, else the system's place."""
    chosen = given or environ.get(DATA_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    name = "PreScope" if sys.platform in ("win32", "darwin") else "prescope"
    return Path(platformdirs.user_data_dir(name, appauthor=False))


def cpu_threads(cores: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return how many threads compute on the CPU: one a core, or fewer if `OMP_NUM_THREADS` asks.

    Who runs something beside the engine says it there: threads that wait for a core they do not
    have take many times longer than one thread alone.
    """
    asked = environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(asked))) if asked.isdecimal() else cores


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where Hugging Face tools keep downloaded models."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def model_folder(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of a model: `default`, a folder, or `owner/name` already downloaded.

    A GGUF file is a model too, and is returned itself. Nothing is downloaded.

    Raises:
        ModelFilesError: the model is known by its form, but its files are not on this disk.
        ConfigError: the name is nothing of these.
    """
    if name == DEFAULT_MODEL:
        if not (DEFAULT_MODEL_DIR / "config.json").is_file():
            raise ModelFilesError(
                f"The built-in model is missing from {DEFAULT_MODEL_DIR}.",
                "Install PreScope again.",
            )
        return DEFAULT_MODEL_DIR
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if folder.suffix == SUFFIX and folder.is_file():
        # The file may be a link to one without the suffix, in a download cache.
        return folder.parent.resolve() / folder.name
    if _HUB_NAME.fullmatch(name):
        found = _downloaded(hub_cache(environ) / ("models--" + name.replace("/", "--")))
        if found is not None:
            return found
        raise ModelFilesError(
            f"{name} is not in the Hugging Face cache of this computer ({hub_cache(environ)}).",
            "Download it first, or give the folder it is in.",
        )
    raise ConfigError(
        f"There is no model called {name!r}.",
        f"Give {DEFAULT_MODEL!r}, a folder, a .gguf file, or owner/name of a downloaded model.",
    )


def model_name(folder: Path) -> str:
    """Return what a person calls the model in `folder`, or the GGUF file."""
    if folder == DEFAULT_MODEL_DIR:
        return DEFAULT_MODEL_NAME
    if folder.suffix == SUFFIX:
        return model_stem(folder.name)
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def _downloaded(repository: Path) -> Path | None:
    """Return the snapshot that `main` points to, else the newest complete-looking one."""
    snapshots = repository / "snapshots"
    try:
        commit = (repository / "refs" / "main").read_text("utf-8")[:80].strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if _COMMIT.fullmatch(commit) and _looks_complete(snapshots / commit):
        return snapshots / commit
    try:
        found = [path for path in snapshots.iterdir() if _looks_complete(path)]
    except OSError:
        return None
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _looks_complete(snapshot: Path) -> bool:
    return (snapshot / "config.json").is_file() or any(snapshot.glob(f"*{SUFFIX}"))
