"""`doctor`: what could keep PreScope from working here, one line each, with what to do."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime import config
from runtime.errors import PreScopeError

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)
NEEDED_FILES = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `next_step` is empty when all is well."""

    name: str
    ok: bool
    detail: str
    next_step: str = ""


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Look at everything; `ok` says whether nothing needs doing."""
    checks = list(_checks(options))
    return {"ok": all(check.ok for check in checks), "checks": [asdict(c) for c in checks]}


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    lines = []
    for check in result["checks"]:
        lines.append(f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']}: {check['detail']}")
        if check["next_step"]:
            lines.append(f"     -> {check['next_step']}")
    return "\n".join(lines) + "\n"


def _checks(options: argparse.Namespace) -> Iterator[Check]:
    yield _python(sys.version_info[:2])
    yield _packages()
    yield _device()
    yield default_model(config.DEFAULT_MODEL_DIR)
    yield data_folder(config.data_dir(options.data_dir))
    yield _engine_process()


def _python(version: tuple[int, ...]) -> Check:
    found = ".".join(map(str, version))
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Check("Python", True, found)
    return Check("Python", False, found, "Install a Python from 3.10 to 3.14.")


def _packages() -> Check:
    try:
        import torch

        from runtime import adapter
    except (ImportError, OSError) as failure:
        return Check("libraries", False, str(failure)[:300], "Run the launcher to repair them.")
    versions = f"torch {torch.__version__}, transformers {metadata.version('transformers')}"
    return Check("libraries", True, f"{versions}; experts run through {adapter.IMPLEMENTATION!r}")


def _device() -> Check:
    from runtime.assembly import profile_for
    from runtime.core import LoadRequest

    profile = profile_for(LoadRequest())
    if profile.emulated:
        return Check("card", True, "none that can be used; the built-in model runs emulated")
    return Check("card", True, f"{profile.device_name}, {profile.vram_total_bytes:,} bytes")


def default_model(folder: Path) -> Check:
    """Look whether the shipped model is there and its weights are those that were trained."""
    again = "Install PreScope again."
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        return Check("built-in model", False, f"{', '.join(missing)} missing in {folder}", again)
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        expected = report["weights"]["sha256"]
        with open(folder / "model.safetensors", "rb") as weights:
            found = hashlib.sha256(weights.read()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as failure:
        return Check("built-in model", False, f"cannot be checked: {failure}", again)
    if found != expected:
        return Check("built-in model", False, f"sha256 is {found}, not {expected}", again)
    return Check("built-in model", True, f"sha256 {found[:16]}")


def data_folder(folder: Path) -> Check:
    """Look whether the data folder can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"PreScope")
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        choose = "Choose another folder with --data-dir or PRESCOPE_DATA_DIR."
        return Check("data folder", False, f"{folder}: {failure.strerror or failure}", choose)
    return Check("data folder", True, str(folder))


def _engine_process() -> Check:
    from runtime.engine_process import EngineProcess

    try:
        process = EngineProcess((), None, 30.0)
        try:
            hello = next(process.frames(), None)
        finally:
            process.kill("the check is over")
            process.reap()
    except (OSError, PreScopeError) as failure:
        return Check("engine process", False, str(failure), "Look at the engine's log.")
    if hello is None:
        return Check("engine process", False, "it ended at once", "Look at the engine's log.")
    return Check("engine process", True, f"answers with protocol {hello.get('protocol')}")
