"""What each model would do on this machine, in a few words, before anything is loaded.

`python -m runtime plan` is asked in the background, one model at a time; the page never waits.
Answers are kept on disk by the model's files, the settings and the machine they hold for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.settings import Settings, SettingsStore, write_private

FILE_NAME = "plans.json"
SCHEMA = 1
MAX_KEPT = 300
CHILD_LIMIT_S = 120.0
_ROOT = Path(__file__).resolve().parent.parent
_SUFFIXES = (".json", ".safetensors", ".gguf")
_MAX_FILES = 1000
_MACHINE_FILE = "machine.json"
_MACHINE_KEYS = ("device_name", "vram_total_bytes", "ram_total_bytes")
_MAX_MACHINE_BYTES = 1 << 16

Ask = Callable[[Sequence[str]], dict[str, Any]]
"""Runs `plan` with these arguments and returns its JSON object, {} where there is none."""


class ModelPlans:
    """Owns the answers and the thread that fetches them; calls come from any thread.

    `close` lets no further child start and ends the one under way.
    """

    def __init__(self, data_dir: Path, settings: SettingsStore, ask: Ask | None = None) -> None:
        self._path = data_dir / FILE_NAME
        self._data_dir = data_dir
        self._settings = settings
        self._ask = ask or self._ask_child
        self._lock = threading.Lock()
        self._known: dict[str, str] = _read(self._path)
        self._asked: set[str] = set()
        self._waiting: queue.SimpleQueue[tuple[str, str, Settings] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None

    def label(self, path: str) -> str:
        """Return what is known of the model at `path`, "" until the answer is there."""
        settings = self._settings.current()
        key = self._key(path, settings)
        with self._lock:
            known = self._known.get(key)
            if known is not None or key in self._asked or self._closed:
                return known or ""
            self._asked.add(key)
            self._waiting.put((key, path, settings))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="plans", daemon=True)
                self._thread.start()
        return ""

    def close(self) -> None:
        """Stop asking."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        self._waiting.put(None)

    def _ask_child(self, arguments: Sequence[str]) -> dict[str, Any]:
        return ask_child([*arguments, "--data-dir", str(self._data_dir)], self._started)

    def _started(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._child = child
            if self._closed:
                child.kill()

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None and not self._closed:
            key, path, settings = asked
            label = label_of(self._ask(arguments_for(path, settings)))
            if not label:  # it failed or knew nothing: asked again at the next start
                continue
            with self._lock:
                self._known[key] = label
                kept = dict(list(self._known.items())[-MAX_KEPT:])
                self._known = kept
            _write(self._path, kept)

    def _key(self, path: str, settings: Settings) -> str:
        """Name the question: the model's files, the settings that change the answer, the card."""
        seen: list[object] = [path, arguments_for(path, settings)]
        seen += _files(Path(path))
        seen.append(_machine(self._data_dir / _MACHINE_FILE))
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def arguments_for(path: str, settings: Settings) -> list[str]:
    """Return the arguments of `plan` that ask for a model under these settings."""
    arguments = ["plan", path, "--json", "--unloaded"]
    if settings.policy is not None:
        arguments += ["--policy", settings.policy]
    if settings.cache_fraction is not None:
        arguments += ["--cache-fraction", str(settings.cache_fraction)]
    if settings.vram_bytes is not None:
        arguments += ["--vram", str(settings.vram_bytes)]
    if settings.experts != "as stored":
        arguments += ["--experts", settings.experts]
    return arguments


def ask_child(
    arguments: Sequence[str],
    started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
) -> dict[str, Any]:
    """Run the plan command in a process of its own, at low priority; `started` is given it."""
    command = [sys.executable, "-m", "runtime", *arguments]
    if os.name == "posix":
        command = ["nice", "-n", "10", *command]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        ) as child:
            try:
                started(child)
                output, _ = child.communicate(timeout=CHILD_LIMIT_S)
            finally:
                child.kill()
        answer = json.loads(output)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return answer if isinstance(answer, dict) else {}


def label_of(answer: Mapping[str, Any]) -> str:
    """Return the answer of `plan --json` in a few words, "" where there is nothing to say."""
    if "error" in answer:
        return f"cannot be loaded: {_first(answer['error'].get('message', ''))}"
    if "fits" not in answer:
        return ""
    if not answer["fits"]:
        return f"does not fit: {_first(answer['why'])}"
    speed = f"about {_figure(answer['speed']['tokens_per_s'])} tok/s (modelled)"
    plan, shape = answer["plan"], answer["shape"]
    if plan["ram_experts"] is not None:
        return f"needs the disk: {speed}"
    if not plan["slots"]:
        return f"fits, without a card: {speed}"
    if plan["slots"] >= answer["experts"]:
        return f"fits: all experts on the card, {speed}"
    layers = len(shape["experts"])
    per_layer, of = plan["slots"] / layers, answer["experts"] / layers
    return f"fits: {per_layer:.0f} of {of:.0f} experts/layer on the card, {speed}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _first(message: str) -> str:
    """Return a message's first clause, short enough for a line of the picker."""
    return message.split(": ")[0].split(". ")[0].rstrip(".")[:120]


def _files(path: Path) -> list[object]:
    try:
        if path.is_file():
            return [_stamp(path)]
        with os.scandir(path) as entries:
            names = [e.name for e in itertools.islice(entries, _MAX_FILES)]
    except (OSError, ValueError):
        return []
    return [[name, _stamp(path / name)] for name in sorted(names) if name.endswith(_SUFFIXES)]


def _machine(path: Path) -> list[object]:
    """Return which card and how much RAM there is; the rest changes a little at every load."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_MACHINE_BYTES))
        return [record[key] for key in _MACHINE_KEYS]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_mtime_ns]


def _read(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            return {}
        return {str(key): str(label) for key, label in record["plans"].items() if label}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(path: Path, plans: Mapping[str, str]) -> None:
    """Keep the answers; a disk that takes none only makes them be asked again."""
    try:
        write_private(path, json.dumps({"schema": SCHEMA, "plans": dict(plans)}).encode())
    except OSError:
        return
