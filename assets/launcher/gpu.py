"""Which NVIDIA card and driver this computer has, asked of the driver library itself.

Run as a script it prints one JSON object. The launcher does so in a child process, because a
broken driver can hang or crash whoever loads it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PROBE_TIMEOUT_S = 10.0
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """`driver_cuda` is the newest CUDA the driver speaks, as (13, 0); the best card counts."""

    name: str
    driver_cuda: tuple[int, int]
    capability: tuple[int, int]


def probe(timeout_s: float = PROBE_TIMEOUT_S) -> Gpu | None:
    """The best NVIDIA card, or None: no card, no driver, a driver that hangs or crashes."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        found = json.loads(done.stdout or b"null")
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    if not found:
        return None
    return Gpu(found["name"], tuple(found["driver_cuda"]), tuple(found["capability"]))


def ask_driver() -> Gpu | None:
    """Calls the driver in this process."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    cards = [_card(cuda, index, version.value) for index in range(count.value)]
    return max(cards, key=lambda card: card.capability)


def _card(cuda: ctypes.CDLL, index: int, version: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    driver_cuda = (version // 1000, version % 1000 // 10)
    return Gpu(name.value.decode("utf-8", "replace"), driver_cuda, (major.value, minor.value))


if __name__ == "__main__":
    card = ask_driver()
    sys.stdout.write(json.dumps(asdict(card) if card else None) + "\n")
