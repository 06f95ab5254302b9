"""How much host memory the driver lets be pinned: tried out in a child process, kept per driver.

Windows and WSL stop far below the RAM there is, by rules that nobody states, and after a refusal a
process may be refused everything. So a child asks, and whatever becomes of it is an answer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from runtime.core import HardwareProfile
from runtime.errors import CancelledError

FILE_NAME = "pinning.json"
SCHEMA = 2
REFUSAL_KEPT_S = 14 * 86400.0
"""A refusal may have been another program's doing: the driver is asked again some day."""
MAX_FILE_BYTES = 1 << 12
LEAST_BYTES = 256 * 2**20
"""Less is not worth a child's start: the engine sees for itself whether it is refused."""
CHILD = (sys.executable, "-I", str(Path(__file__).with_name("hardware_pinning_child.py")))
_LOOK_S = 0.1
_CANCEL_S = 1.0
_START_S = 30.0
_END_S = 30.0
"""What was pinned is free only when the child is gone, and giving gigabytes back takes a while."""
_LEAST_BYTES_PER_S = 0.5e9
_PINNED = re.compile(rb"pinned (\d{1,16})\s*")

_GIVING_BACK: list[subprocess.Popen[bytes]] = []
"""Children that were ended and are not gone yet: what they pinned would look like a refusal."""

log = logging.getLogger("prescope.hardware")


@dataclass(frozen=True)
class Pinning:
    """`pinned_bytes` were pinned at once, and then it was enough, or something else happened."""

    pinned_bytes: int
    ended: Literal["enough", "refused", "died", "hung"]


Measure = Callable[[int, int], Pinning]
"""measure(wanted_bytes, device_bytes)"""


def with_pinnable(
    profile: HardwareProfile,
    wanted_bytes: int,
    device_bytes: int,
    driver: Callable[[], str | None],
    folder: Path,
    measure: Measure | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    now_s: Callable[[], float] = time.time,
) -> HardwareProfile:
    """Return the profile of a card with how much host memory can be pinned beside it.

    Args:
        profile: this machine's.
        wanted_bytes: what a plan would like to pin; no more is tried.
        device_bytes: what it takes of the card, which some drivers count as well.
        driver: tells the driver's version, or None if that is unknown: then nothing is kept.
        folder: where the answer is kept until driver or RAM change, a refusal for two weeks.
        measure: asks the driver.
        cancelled: whether nobody waits for the answer any more.
        now_s: the time of day.

    Raises:
        CancelledError: `cancelled` returned True.
    """
    if profile.device_kind != "cuda" or wanted_bytes < LEAST_BYTES:
        return profile
    version = driver()
    machine = None if version is None else f"{version}, {profile.ram_total_bytes} bytes of RAM"
    found = _kept(folder, machine, now_s())
    if found is None or (found.ended == "enough" and found.pinned_bytes < wanted_bytes):
        measure = measure or partial(measured, cancelled=cancelled)
        found = measure(wanted_bytes, device_bytes)
        log.info("pinning %d bytes: %s", wanted_bytes, found)
        if found.ended in ("enough", "refused"):  # the others may have had another cause
            _keep(folder, machine, found, now_s())
    return replace(profile, pinnable_bytes=None if found.ended == "enough" else found.pinned_bytes)


def measured(
    wanted_bytes: int,
    device_bytes: int,
    command: Sequence[str] = CHILD,
    deadline_s: float | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Pinning:
    """Let a child pin up to `wanted_bytes`, with `device_bytes` of the card in use.

    It is waited for until `deadline_s` and no longer, even if it cannot be ended.

    Raises:
        CancelledError: `cancelled` returned True; the child is ended.
    """
    if deadline_s is None:
        deadline_s = _START_S + wanted_bytes / _LEAST_BYTES_PER_S
    if not _given_back(cancelled):
        return Pinning(0, "hung")
    process = subprocess.Popen(
        [*command, str(wanted_bytes), str(device_bytes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    lines: list[bytes] = []

    def listen() -> None:
        assert process.stdout is not None
        with process.stdout as said:
            lines.extend(said)

    listening = threading.Thread(target=listen, name="prescope-pinning", daemon=True)
    listening.start()
    until_s, stopped = time.monotonic() + deadline_s, False
    while listening.is_alive() and time.monotonic() < until_s and not stopped:
        listening.join(_LOOK_S)
        stopped = cancelled()
    hung = listening.is_alive()
    process.kill()  # it has said all, or nothing more is wanted
    try:
        process.wait(_CANCEL_S if stopped else _END_S)
    except subprocess.TimeoutExpired:
        _GIVING_BACK.append(process)
        if not stopped:
            log.warning("the process that pins memory cannot be ended: the driver hangs")
    if stopped:
        raise CancelledError("Loading was stopped.")
    heard = list(lines)
    steps = [int(match[1]) for line in heard if (match := _PINNED.fullmatch(line))]
    pinned_bytes = min(max(steps, default=0), wanted_bytes)
    last = heard[-1].strip() if heard else b""
    if last == b"enough" and pinned_bytes == wanted_bytes:
        return Pinning(pinned_bytes, "enough")
    if last == b"refused":
        return Pinning(pinned_bytes, "refused")
    return Pinning(pinned_bytes, "hung" if hung else "died")


def _given_back(cancelled: Callable[[], bool]) -> bool:
    """Wait until earlier children have given back what they pinned; say whether they have."""
    until_s = time.monotonic() + _END_S
    while _GIVING_BACK and time.monotonic() < until_s:
        if _GIVING_BACK[0].poll() is not None:
            _GIVING_BACK.pop(0)
        elif cancelled():
            raise CancelledError("Loading was stopped.")
        else:
            time.sleep(_LOOK_S)
    return not _GIVING_BACK


def _kept(folder: Path, machine: str | None, now_s: float) -> Pinning | None:
    if machine is None:
        return None
    try:
        with (folder / FILE_NAME).open("rb") as file:
            record = json.loads(file.read(MAX_FILE_BYTES))
        if record["schema"] != SCHEMA or record["machine"] != machine:
            return None
        pinned_bytes, ended = record["pinned_bytes"], record["ended"]
        age_s = now_s - float(record["asked_s"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    if type(pinned_bytes) is not int or pinned_bytes < 0 or ended not in ("enough", "refused"):
        return None
    if ended == "refused" and not 0.0 <= age_s <= REFUSAL_KEPT_S:
        return None
    return Pinning(pinned_bytes, ended)


def _keep(folder: Path, machine: str | None, found: Pinning, now_s: float) -> None:
    """Write what was found; a folder that cannot be written to keeps nothing."""
    if machine is None:
        return
    path = folder / FILE_NAME
    fresh = path.with_suffix(f".{os.getpid()}")
    record = {
        "schema": SCHEMA,
        "machine": machine,
        "pinned_bytes": found.pinned_bytes,
        "ended": found.ended,
        "asked_s": now_s,
    }
    try:
        fresh.write_text(json.dumps(record), encoding="utf-8")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
