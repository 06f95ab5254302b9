"""How fast this machine's disk brings whole experts: a short read of the model's own largest file.

Past the page cache, several reads at a time, as the tier reads. Where the system has no such reads
nothing can be said, and the assumed figures stay.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from runtime.core import HardwareProfile, Reading
from runtime.disk_direct import BOUNCE_BYTES, DirectFile

LEAST_FILE_BYTES = 64 * 2**20
READERS = 4
MEASURE_S = 0.3
_CALLS = 16
_WEIGHTS = (".safetensors", ".gguf")
_PLAUSIBLE = (1e6, 1e12)


def with_disk(profile: HardwareProfile, model: Path) -> HardwareProfile:
    """Return the profile with its disk measured on the largest file of weights in the folder (or
    the file) `model`, if that can be done.

    Takes `MEASURE_S` and the time of a few reads. An emulated disk stays as it was stated.
    """
    if profile.emulated:
        return profile
    try:
        files = [model] if model.is_file() else [p for p in model.iterdir() if p.suffix in _WEIGHTS]
        size_bytes, largest = max(
            ((path.stat().st_size, path) for path in files), default=(0, model)
        )
        if size_bytes < LEAST_FILE_BYTES:
            return profile
        with open(largest, "rb", buffering=0) as file:
            direct = DirectFile(file.fileno())
            try:
                if not direct.direct:
                    return profile
                call_s = _call_s(direct, size_bytes)
                bytes_per_s = _bytes_per_s(direct, size_bytes)
            finally:
                direct.close()
    except OSError:
        return profile
    if not _PLAUSIBLE[0] < bytes_per_s < _PLAUSIBLE[1]:
        return profile
    return replace(
        profile,
        disk_bytes_per_s=Reading(bytes_per_s, "measured"),
        disk_call_s=Reading(call_s, "measured"),
    )


def _call_s(file: DirectFile, size_bytes: int) -> float:
    """Return the shortest time of a small read somewhere else than the one before."""
    buffer = memoryview(bytearray(4096))
    shortest = float("inf")
    for number in range(_CALLS):
        began_s = time.perf_counter()
        file.read_at([buffer], size_bytes * number // _CALLS // 4096 * 4096)
        shortest = min(shortest, time.perf_counter() - began_s)
    return shortest


def _bytes_per_s(file: DirectFile, size_bytes: int) -> float:
    """Return the rate of several readers, each in a part of the file of its own."""
    ends_s = time.perf_counter() + MEASURE_S
    part_bytes = size_bytes // READERS

    def read(number: int) -> int:
        buffer = memoryview(bytearray(BOUNCE_BYTES))
        done = 0
        while time.perf_counter() < ends_s and done + BOUNCE_BYTES <= part_bytes:
            done += file.read_at([buffer], number * part_bytes + done)
        return done

    began_s = time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        read_bytes = sum(readers.map(read, range(READERS)))
    return read_bytes / (time.perf_counter() - began_s)
