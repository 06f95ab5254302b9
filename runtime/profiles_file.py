"""The profile of this machine's card, kept from the last load for those who must not touch it.

Probing takes memory on the card and measures its link, which nobody may do beside a running engine.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from runtime.core import HardwareProfile, Reading
from runtime.machines import RAM_IN_USE_BYTES

FILE_NAME = "machine.json"
SCHEMA = 1
MAX_BYTES = 1 << 16


def keep_profile(profile: HardwareProfile, folder: Path) -> None:
    """Write what was probed; only that of a card is kept, for all else costs nothing to find out.

    A folder that cannot be written to keeps nothing.
    """
    if profile.device_kind != "cuda":
        return
    path = folder / FILE_NAME
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"schema": SCHEMA, **asdict(profile)}), encoding="utf-8")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)


def kept_profile(folder: Path) -> HardwareProfile | None:
    """Return what was kept, with memory as it is while no model is loaded, or None."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            record = json.loads(file.read(MAX_BYTES))
        if record.pop("schema") != SCHEMA:
            return None
        profile = HardwareProfile(**{name: _value(value) for name, value in record.items()})
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    if not _sound(profile):
        return None
    return replace(
        profile,
        vram_free_bytes=max(profile.vram_free_bytes, profile.vram_total_bytes * 15 // 16),
        ram_free_bytes=max(profile.ram_free_bytes, profile.ram_total_bytes - RAM_IN_USE_BYTES),
    )


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Reading(float(value["value"]), value["source"])
    return value


def _sound(profile: HardwareProfile) -> bool:
    for field in fields(profile):
        value = getattr(profile, field.name)
        if "Reading" in str(field.type) and not (isinstance(value, Reading) and value.value > 0):
            return False
        if field.type == "bool" and type(value) is not bool:
            return False
        if field.type == "int" and (type(value) is not int or value < 0):
            return False
    return profile.device_kind == "cuda"
