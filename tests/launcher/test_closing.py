"""No signal is lost, at whatever moment it comes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from assets.launcher.places import ROOT

# A thread of its own signals the process just when the main thread begins to wait.
SIGNALLED = """
import os, random, signal, sys, threading, time
from assets.launcher.closing import Closing
sys.setswitchinterval(1e-5)
closing = Closing(lambda: None)
for _ in range(5000):
    closing.asked.clear()
    at_s = time.perf_counter() + random.uniform(0, 2e-4)
    def send():
        while time.perf_counter() < at_s:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    closing.wait()
    sender.join()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_is_heard_though_the_main_thread_goes_to_sleep() -> None:
    subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, check=True, timeout=60)
