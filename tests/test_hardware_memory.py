"""What nobody holds any more goes back to the system, also what threads took in many pieces."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Blocks too small to be mapped one by one, taken by a thread: the C library gives it a heap of its
# own. What is taken last keeps the heap from shrinking by itself.
TAKEN_BY_A_THREAD = """
import threading
import psutil
from runtime.hardware_memory import give_back_memory

kept = []
def take():
    blocks = [bytearray(100_000) for _ in range(1000)]
    kept.append(bytearray(100_000))

def resident():
    return psutil.Process().memory_info().rss

before = resident()
thread = threading.Thread(target=take)
thread.start()
thread.join()
left = resident() - before
give_back_memory()
print(left, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_what_a_thread_took_goes_back_to_the_system() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TAKEN_BY_A_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    left, after = map(int, ran.stdout.split())
    assert left > 50e6, "nothing was kept, so nothing can be shown"
    assert after < 20e6
