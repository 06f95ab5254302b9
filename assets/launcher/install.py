"""From nothing, or from an older environment, to one that is complete, verified and in use."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

from assets.launcher import environment, gpu, torch_build
from assets.launcher.environment import Environment
from assets.launcher.faults import Fault, FolderFault, InstallFault, explained, from_os_error
from assets.launcher.instance import FileLock
from assets.launcher.places import ROOT
from assets.launcher.torch_install import install_torch
from assets.launcher.workshop import PINNED_ONLY, QUICKLY, Workshop

# Measured on Linux: 0.8 GB of packages beside torch, and half as much again while they come.
NEEDED_WITHOUT_TORCH_BYTES = 1_150_000_000
VERIFY_TIMEOUT_S = 300.0


class Installer:
    """Provides the environment to run in. One thread at a time."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._places = shop.places
        self._report = shop.report

    def enter(self) -> tuple[Environment, FileLock]:
        """The environment for today's lock and Python, built if need be, and the lock that keeps it
        there: hold it as long as anything runs in it. Raises `Fault`."""
        while True:
            ready = self._ensure()
            used = ready.in_use()
            # Between the two steps above another launcher's update may have removed it.
            if used.acquire(shared=True) and ready.python.exists():
                return ready, used
            used.release()
            time.sleep(0.1)

    def ensure_test_tools(self, ready: Environment) -> None:
        """pytest and the linters, once, in an environment that is already in use."""
        wanted = (self._shop.lock_folder / "test.txt").read_text(encoding="utf-8")
        mark = ready.test_mark
        found = mark.read_text(encoding="utf-8") if mark.exists() else None
        if found == wanted:
            return
        lock = self._installing()
        try:
            self._report.step("Installing the test tools", 0.0, 1.0)
            mark.write_text("incomplete", encoding="utf-8")
            force = ["--force-reinstall"] if found == "incomplete" else []
            self._pip_requirements(ready, "test.txt", force)
            mark.write_text(wanted, encoding="utf-8")
        finally:
            lock.release()

    def tidy(self, ready: Environment) -> None:
        """Removes environments that were still in use when their successor was made."""
        lock = self._install_lock()
        if lock.acquire():
            environment.remove_others(self._places, ready, self._report.log_only)
            lock.release()

    def _ensure(self) -> Environment:
        ready = environment.current(self._places, self._shop.lock_folder)
        if ready is not None:
            return ready
        lock = self._installing()
        try:
            ready = environment.current(self._places, self._shop.lock_folder)
            return ready or self._build_or_keep()
        finally:
            lock.release()

    def _build_or_keep(self) -> Environment:
        """A new environment; or, if that fails, the stale one, which still does."""
        try:
            return self._build()
        except (Fault, OSError) as error:
            fault = error if isinstance(error, Fault) else from_os_error("Installing", error)
            stale = environment.current(self._places, self._shop.lock_folder, even_if_stale=True)
            if stale is None:
                raise fault from error
            self._report.line(f"{fault} Going on with what was there before.")
            return stale

    def _install_lock(self) -> FileLock:
        return FileLock(self._places.run / "install.lock")

    def _installing(self) -> FileLock:
        """One installation at a time; a second launcher waits for the first one's result."""
        lock = self._install_lock()
        if not lock.acquire():
            self._report.line("Another PreScope is installing; waiting for it.")
            while not lock.acquire():
                self._report.check_stopped()
                time.sleep(0.2)
        return lock

    def _build(self) -> Environment:
        self._shop.check_room(NEEDED_WITHOUT_TORCH_BYTES)
        card = gpu.probe()
        self._report.line(f"Graphics card: {card.name}" if card else "No NVIDIA card was found.")
        override = os.environ.get("PRESCOPE_TORCH", "").strip().lower()
        suits = torch_build.suitable(card, platform.system())[0].name
        builds = torch_build.suitable(card, platform.system(), override)
        wanted = override or suits
        generation = environment.next_generation(self._places)
        key = environment.wanted_key(wanted, self._shop.lock_folder, generation)
        new = environment.environment_for(self._places, key)
        lock = new.in_use()
        if not lock.acquire():
            raise FolderFault(
                f"{new.folder} has to be made again, but something still runs in it.",
                "Close every PreScope and its tests, then retry.",
            )
        try:
            self._report.line(f"Building {new.folder}")
            environment.remove_tree(new.folder)
            self._make(new)
            self._report.step("Installing packages", 0.06, 0.35)
            self._pip_requirements(new, "requirements.txt", [])
            used, note = install_torch(self._shop, new, builds)
            verified = self._verify(new)
        finally:
            lock.release()
        if used.name != "cpu" and verified.get("why"):
            note = f"{note} The GPU cannot be used: {verified['why']}".strip()
        if note:
            self._report.line(note)
        chosen = {"key": key, "wanted": wanted, "generation": generation, "suits": suits}
        record = {**chosen, "build": used.name, "note": note, **verified}
        environment.switch(self._places, record)
        shutil.rmtree(self._places.wheels, ignore_errors=True)
        environment.remove_others(self._places, new, self._report.line)
        return new

    def _make(self, new: Environment) -> None:
        """An empty environment with the pinned pip, which the bundled one fetches."""
        self._report.step("Making a private Python environment", 0.02, 0.06)
        status, tail = self._shop.run(sys.executable, "venv", ["--without-pip", str(new.folder)])
        if status:
            raise explained("Making the Python environment", tail)
        arguments = ["install", "--ignore-installed", *PINNED_ONLY, *QUICKLY]
        arguments += ["-r", str(self._shop.lock_folder / "pip.txt")]
        extra = {"PYTHONPATH": str(bundled_pip())}
        status, tail = self._shop.run(new.python, "pip", arguments, extra=extra)
        if status:
            raise explained("Fetching pip", tail)

    def _pip_requirements(self, where: Environment, name: str, extra: list[str]) -> None:
        requirements = self._shop.lock_folder / name
        pins = sum("==" in line for line in requirements.read_text("utf-8").splitlines())
        seen = 0

        def on_line(line: str) -> None:
            nonlocal seen
            self._report.log_only(line)
            if line.startswith(("Collecting ", "Processing ", "Ignoring ")):
                seen += 1
                self._report.progress(seen, pins * 1.25, package_in(line))
            elif line.startswith("Installing collected"):
                self._report.progress(0.85, 1.0, f"Unpacking {line.count(',') + 1} packages")

        arguments = ["install", *PINNED_ONLY, *QUICKLY, *extra, "-r", str(requirements)]
        status, tail = self._shop.run(where.python, "pip", arguments, on_line)
        if status:
            raise explained(f"Installing {name}", tail)

    def _verify(self, new: Environment) -> dict[str, object]:
        self._report.step("Trying it out", 0.92, 0.97)
        status, tail = self._shop.run(
            new.python,
            "assets.launcher.verify",
            [],
            extra={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            timeout_s=VERIFY_TIMEOUT_S,
        )
        try:
            found = json.loads(tail[-1]) if tail and not status else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise explained("Trying out the new environment", tail)
        self._report.line(f"torch {found.get('torch')} works on {found.get('device')}.")
        return found


def package_in(line: str) -> str:
    """`Collecting gradio==6.31.0 (from ...)`, `Processing /a/pandas-3.1.1-cp311.whl`: the name."""
    subject = line.split()[1].replace("\\", "/").rsplit("/", 1)[-1]
    return re.split(r"[=<>~!;:]|-\d", subject)[0]


def bundled_pip() -> Path:
    """A pip to fetch the pinned pip with: Python's own, Debian's, or this Python's."""
    folders = [Path("/usr/share/python-wheels")]
    ensurepip = importlib.util.find_spec("ensurepip")
    if ensurepip is not None and ensurepip.origin:
        folders.insert(0, Path(ensurepip.origin).parent / "_bundled")
    for folder in folders:
        for wheel in sorted(folder.glob("pip-*.whl")):
            return wheel
    installed = importlib.util.find_spec("pip")
    if installed is not None and installed.origin:
        return Path(installed.origin).parents[1]
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    raise InstallFault(
        f"This Python ({sys.executable}) came without pip and without ensurepip.",
        f"On Debian or Ubuntu: sudo apt install {name}-venv. Elsewhere: install Python from "
        "https://www.python.org/downloads/ and start launcher.py with it.",
    )
