"""How long a start takes where nothing has to be installed, told so that machines compare."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from assets.launcher.environment import Environment
from assets.launcher.faults import AppFault
from assets.launcher.instance import FileLock, read_app
from assets.launcher.places import ROOT, Places

REPEATS = 3
START_WITHIN_S = 120.0


def measure(ready: Environment, places: Places, environ: dict[str, str]) -> dict[str, float]:
    """Best of three, each: importing gradio alone, and the launcher until its app is healthy."""
    if not FileLock(places.run / "launcher.lock").acquire():
        raise AppFault("PreScope is running.", "Close it, then measure again.")
    importing = _best(lambda: _seconds_of([str(ready.python), "-c", "import gradio"], environ))
    starting = _best(lambda: _seconds_to_start(places))
    return {
        "import_gradio_s": round(importing, 3),
        "start_to_usable_s": round(starting, 3),
        "ratio": round(starting / importing, 3),
    }


def _best(one: Callable[[], float]) -> float:
    return min(one() for _ in range(REPEATS))


def _seconds_of(command: list[str], environ: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(command, env=environ, check=True, stdin=subprocess.DEVNULL)
    return time.monotonic() - began


def _seconds_to_start(places: Places) -> float:
    command = [sys.executable, str(ROOT / "launcher.py"), "--no-browser"]
    began = time.monotonic()
    launcher = subprocess.Popen(
        [*command, "--data-dir", str(places.data)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while True:
            app = read_app(places)
            if app is not None and app.is_healthy():
                return time.monotonic() - began
            if launcher.poll() is not None or time.monotonic() - began > START_WITHIN_S:
                raise AppFault("The app did not start.", f"Look into {places.app_log}.")
            time.sleep(0.02)
    finally:
        launcher.terminate()
        launcher.wait()
