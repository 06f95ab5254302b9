"""What a person chose, kept in one JSON file that survives being damaged or edited by hand.

`Settings` is frozen; `SettingsStore` holds the current one and replaces it. A value that cannot be
used falls back alone, by name, and the file it was found in is kept as `settings.json.bad`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.core import (
    EXPERTS_WISHES,
    POLICIES,
    EmulatedMachine,
    ExpertsWish,
    LoadRequest,
    PolicyName,
    SamplingParams,
)
from runtime.errors import ConfigError

VERSION = 1
FILE_NAME = "settings.json"
Theme = Literal["auto", "light", "dark"]
_MAX_FILE_BYTES = 1 << 20
_MAX_TEXT = 100_000
_TERA = float(1 << 40)


@dataclass(frozen=True)
class Settings:
    """Everything the settings drawer can change. `policy` None lets the engine choose."""

    system_prompt: str = ""
    sampling: SamplingParams = SamplingParams()
    theme: Theme = "auto"
    model: str = "default"
    model_folders: tuple[str, ...] = ()
    policy: PolicyName | None = None
    prediction: bool = True
    emulated: EmulatedMachine = field(default_factory=EmulatedMachine)
    cache_fraction: float | None = None
    vram_bytes: int | None = None
    experts: ExpertsWish = "as stored"

    def load_request(self, model: str | None = None) -> LoadRequest:
        """Return what to ask the engine for `model`, or for the chosen one."""
        return LoadRequest(
            model=model or self.model,
            policy=self.policy,
            cache_fraction=self.cache_fraction,
            vram_bytes=self.vram_bytes,
            emulated=self.emulated,
            experts=self.experts,
        )


Check = Callable[[Any], Any]


def _number(low: float, high: float, *, whole: bool = False) -> Check:
    kind = "a whole number" if whole else "a number"

    def check(value: Any) -> Any:
        usable = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not usable or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{kind} from {low:g} to {high:g}")
        if whole and value != int(value):
            raise ValueError(f"{kind} from {low:g} to {high:g}")
        return int(value) if whole else float(value)

    return check


def _choice(*options: str) -> Check:
    def check(value: Any) -> Any:
        if value not in options:
            raise ValueError("one of " + ", ".join(options))
        return value

    return check


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\x00" in value:
        raise ValueError(f"text of at most {_MAX_TEXT} characters")
    return value.encode("utf-8", "replace").decode("utf-8")


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > 1000:
        raise ValueError("a list of at most 1000 folders")
    return tuple(dict.fromkeys(_text(item) for item in value))


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_RATE = _number(1.0, _TERA)
_DELAY = _number(0.0, 10.0)
_CHECKS: dict[str, Check | dict[str, Check]] = {
    "system_prompt": _text,
    "sampling": {
        "max_new_tokens": _number(1, 1_000_000, whole=True),
        "temperature": _number(0.0, 5.0),
        "top_p": _number(0.0, 1.0),
        "top_k": _number(0, 1_000_000, whole=True),
        "min_p": _number(0.0, 1.0),
        "repetition_penalty": _number(0.1, 10.0),
        "seed": _optional(_number(0, 2**63 - 1, whole=True)),
    },
    "theme": _choice("auto", "light", "dark"),
    "model": _text,
    "model_folders": _texts,
    "policy": _optional(_choice(*POLICIES)),
    "prediction": _flag,
    "emulated": {
        "link_bytes_per_s": _RATE,
        "link_call_s": _DELAY,
        "cpu_expert_bytes_per_s": _RATE,
        "cpu_expert_bytes_per_s_while_copying": _RATE,
        "cpu_call_s": _DELAY,
        "device_bytes_per_s": _RATE,
        "device_layer_s": _DELAY,
        "host_layer_s": _DELAY,
        "vram_bytes": _number(0, _TERA, whole=True),
        "disk_bytes_per_s": _RATE,
        "disk_call_s": _DELAY,
    },
    "cache_fraction": _optional(_number(0.0, 1.0)),
    "vram_bytes": _optional(_number(0, _TERA, whole=True)),
    "experts": _choice(*EXPERTS_WISHES),
}


class SettingsStore:
    """Owns the file; every method may be called from any thread.

    `notices` tells a person which values of the file could not be used.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._lock = threading.Lock()
        self._settings, self.notices = _read(self.path)

    def current(self) -> Settings:
        """Return the settings in force."""
        return self._settings

    def update(self, **changes: Any) -> Settings:
        """Change fields of `Settings`, save them, and return what is in force now.

        `sampling` and `emulated` take the record or a dict with only the fields to change.

        Raises:
            ConfigError: a value cannot be used, or the file cannot be written; nothing changed.
        """
        with self._lock:
            record = dataclasses.asdict(self._settings)
            for key, value in changes.items():
                record_given = dataclasses.is_dataclass(value) and not isinstance(value, type)
                plain = dataclasses.asdict(value) if record_given else value
                if isinstance(plain, dict) and isinstance(record.get(key), dict):
                    record[key].update(plain)
                else:
                    record[key] = plain
            settings, problems = _parse(record)
            if problems:
                raise ConfigError(problems[0], "Nothing was changed.")
            try:
                _write(self.path, settings)
            except OSError as error:
                raise ConfigError(
                    f"The settings could not be saved to {self.path}: {error.strerror}.",
                    "Check that the disk is not full and that the folder can be written.",
                ) from error
            self._settings = settings
            return settings


def _parse(record: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Return the settings of a record and one sentence per value that could not be used."""
    problems: list[str] = []
    values = _checked(record, _CHECKS, dataclasses.asdict(Settings()), "", problems)
    values["sampling"] = SamplingParams(**values["sampling"])
    values["emulated"] = EmulatedMachine(**values["emulated"])
    return Settings(**values), problems


def _checked(
    record: dict[str, Any],
    checks: dict[str, Any],
    fallback: dict[str, Any],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    for key in sorted(record.keys() - checks.keys()):
        problems.append(f"The setting {prefix}{key[:60]} is not known here.")
    values = dict(fallback)
    for key in record.keys() & checks.keys():
        check, name = checks[key], prefix + key
        if isinstance(check, dict):
            if isinstance(record[key], dict):
                values[key] = _checked(record[key], check, fallback[key], name + ".", problems)
            else:
                problems.append(f"The setting {name} must be a group of values.")
            continue
        try:
            values[key] = check(record[key])
        except (ValueError, OverflowError) as error:
            problems.append(
                f"The setting {name} must be {error}; {record[key]!r:.60} was not used."
            )
    return values


def _read(path: Path) -> tuple[Settings, list[str]]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return Settings(), []
    except OSError as error:
        return Settings(), [f"The settings in {path} could not be read: {error.strerror}."]
    try:
        if len(raw) > _MAX_FILE_BYTES:
            raise ValueError(f"larger than {_MAX_FILE_BYTES} bytes")
        record = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        kept = _keep_bad(path, raw)
        return Settings(), [f"The settings in {path} are damaged ({error}); kept as {kept}."]
    version = record.pop("version", None)
    settings, problems = _parse(record)
    if version != VERSION:
        problems.insert(0, f"The settings have version {version!r:.20}; this is {VERSION}.")
    if problems:
        problems.append(f"The settings file was kept as {_keep_bad(path, raw)}.")
    return settings, problems


def _keep_bad(path: Path, raw: bytes) -> Path:
    kept = path.with_name(path.name + ".bad")
    try:
        write_private(kept, raw)
    except OSError:
        return path
    return kept


def _write(path: Path, settings: Settings) -> None:
    record = {"version": VERSION, **dataclasses.asdict(settings)}
    write_private(path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def write_private(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one. Mode 0600."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _move(Path(name), path)
    except BaseException:
        os.unlink(name)
        raise


def _move(new: Path, path: Path) -> None:
    """Put `new` in place of `path`; on Windows a virus scanner may hold either for a moment."""
    for attempts_left in reversed(range(20)):
        try:
            os.replace(new, path)
        except PermissionError:
            if os.name != "nt" or not attempts_left:
                raise
            time.sleep(0.1)
        else:
            return
