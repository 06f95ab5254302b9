"""From nothing, or from an older environment, to one that is complete, verified and in use."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from assets.launcher import environment, gpu, torch_build
from assets.launcher.children import Children, clean_environ
from assets.launcher.download import Download, RefusedFault, Wheel
from assets.launcher.environment import LOCK_FOLDER, Environment
from assets.launcher.faults import (
    MAKE_ROOM,
    ConsentFault,
    Fault,
    FolderFault,
    InstallFault,
    explained,
    from_os_error,
)
from assets.launcher.instance import FileLock
from assets.launcher.places import ROOT, Places
from assets.launcher.report import Question, Report
from assets.launcher.torch_build import Build

# Unpacked sizes measured on Linux: 0.6 GB of packages beside torch, 0.8 GB of torch for the CPU.
NEEDED_WITHOUT_TORCH_BYTES = 900_000_000
UNPACKED_PER_WHEEL_BYTE = 2.6
VERIFY_TIMEOUT_S = 300.0
PINNED_ONLY = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
QUICKLY = ["--no-compile", "--progress-bar=off", "--no-warn-script-location"]


class Installer:
    """Builds environments under `places`; says so through `report`. One thread at a time."""

    def __init__(
        self,
        places: Places,
        report: Report,
        children: Children,
        lock_folder: Path = LOCK_FOLDER,
    ) -> None:
        self._places = places
        self._report = report
        self._children = children
        self._lock_folder = lock_folder
        self._environ = clean_environ(os.environ, places.data)

    def ensure(self) -> Environment:
        """The environment for today's lock and Python, built if need be. Raises `Fault`."""
        ready = environment.current(self._places, self._lock_folder)
        if ready is not None:
            return ready
        lock = self._installing()
        try:
            ready = environment.current(self._places, self._lock_folder)
            return ready or self._build()
        except OSError as error:
            raise from_os_error("Installing", error) from error
        finally:
            lock.release()

    def ensure_test_tools(self, ready: Environment) -> None:
        """pytest and the linters, once, in an environment that is already in use."""
        wanted = (self._lock_folder / "test.txt").read_text(encoding="utf-8")
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

    def _installing(self) -> FileLock:
        """One installation at a time; a second launcher waits for the first one's result."""
        lock = FileLock(self._places.run / "install.lock")
        if not lock.acquire():
            self._report.line("Another PreScope is installing; waiting for it.")
            while not lock.acquire():
                self._report.check_stopped()
                time.sleep(0.2)
        return lock

    def _build(self) -> Environment:
        self._check_room(NEEDED_WITHOUT_TORCH_BYTES)
        card = gpu.probe()
        self._report.line(f"Graphics card: {card.name}" if card else "No NVIDIA card was found.")
        override = os.environ.get("PRESCOPE_TORCH", "").strip().lower()
        builds = torch_build.suitable(card, platform.system(), override)
        wanted = override or builds[0].name
        key = environment.wanted_key(wanted, self._lock_folder)
        new = environment.environment_for(self._places, key)
        self._report.line(f"Building {new.folder}")
        environment.remove_tree(new.folder)
        self._make(new)
        self._install_packages(new)
        used, note = self._install_torch(new, builds)
        verified = self._verify(new)
        if used.name != "cpu" and verified.get("why"):
            note = f"{note} The GPU cannot be used: {verified['why']}".strip()
        if note:
            self._report.line(note)
        record = {"build": used.name, "note": note, **verified}
        environment.switch(self._places, key, wanted, record)
        shutil.rmtree(self._places.wheels, ignore_errors=True)
        environment.remove_others(self._places, new, self._report.line)
        return new

    def _make(self, new: Environment) -> None:
        self._report.step("Making a private Python environment", 0.02, 0.06)
        arguments = ["--without-pip", str(new.folder)]
        status, tail = self._run(sys.executable, "venv", arguments)
        if status:
            raise explained("Making the Python environment", tail)
        bootstrap = dict(self._environ, PYTHONPATH=str(_some_pip()))
        arguments = ["install", "--ignore-installed", *PINNED_ONLY, *QUICKLY]
        arguments += ["-r", str(self._lock_folder / "pip.txt")]
        status, tail = self._children.run(
            new.python, "pip", arguments, bootstrap, self._report.log_only
        )
        if status:
            raise explained("Fetching pip", tail)

    def _install_packages(self, new: Environment) -> None:
        self._report.step("Installing packages", 0.06, 0.35)
        self._pip_requirements(new, "requirements.txt", [])

    def _pip_requirements(self, where: Environment, name: str, extra: list[str]) -> None:
        requirements = self._lock_folder / name
        pins = sum("==" in line for line in requirements.read_text("utf-8").splitlines())
        seen = 0

        def on_line(line: str) -> None:
            nonlocal seen
            self._report.log_only(line)
            if line.startswith("Collecting "):
                seen += 1
                self._report.progress(seen, pins * 1.25, line.split()[1].split("==")[0])
            elif line.startswith("Installing collected"):
                self._report.progress(0.9, 1.0, "unpacking")

        arguments = ["install", *PINNED_ONLY, *QUICKLY, *extra, "-r", str(requirements)]
        status, tail = self._run(where.python, "pip", arguments, on_line)
        if status:
            raise explained(f"Installing {name}", tail)

    def _install_torch(self, new: Environment, builds: list[Build]) -> tuple[Build, str]:
        """The first build that can be had, and a remark where it is not the first choice."""
        note = ""
        for build in builds:
            self._report.step(f"Choosing torch for this computer ({build.name})", 0.35, 0.4)
            try:
                wheels = torch_build.resolve(
                    build,
                    new.python,
                    self._lock_folder / "torch.txt",
                    self._children,
                    self._environ,
                    self._report.log_only,
                    self._places.run,
                )
                self._agree(build, wheels, alternatives=build is not builds[-1])
                self._install_wheels(new, build, wheels)
                return build, note
            except (ConsentFault, Fault) as fault:
                if isinstance(fault, FolderFault) or build is builds[-1]:
                    raise
                self._report.line(f"{fault} Trying another source.")
                note = f"Not the first choice of torch ({builds[0].name}): {fault}"
        raise InstallFault("There is no build of torch to try.", "Unset PRESCOPE_TORCH, retry.")

    def _agree(self, build: Build, wheels: list[Wheel], alternatives: bool) -> None:
        """Nobody's connection or disk is filled without a yes."""
        size = torch_build.bytes_to_fetch(wheels, self._places.wheels)
        self._check_room(size + int(size * UNPACKED_PER_WHEEL_BYTE))
        if size <= torch_build.CONSENT_ABOVE_BYTES:
            return
        text = (
            f"torch ({build.name}) is a download of {size / 1e9:.1f} GB in {len(wheels)} files "
            f"from {build.where}."
        )
        no = "Use the CPU build instead" if alternatives else "Stop here"
        if not self._report.ask(Question(text, f"Download {size / 1e9:.1f} GB", no)):
            raise ConsentFault(f"{text} That was declined.", "Retry to be asked again.")

    def _install_wheels(self, new: Environment, build: Build, wheels: list[Wheel]) -> None:
        self._report.step("Downloading torch", 0.4, 0.82)
        total = sum(wheel.size_bytes for wheel in wheels)
        requirements, before = [], 0
        for wheel in wheels:
            requirements.append(self._brought(wheel, _Meter(self._report, wheel, before, total)))
            before += wheel.size_bytes
        self._report.step("Installing torch", 0.82, 0.92)
        arguments = ["install", "--no-deps", "--only-binary=:all:", *QUICKLY, *requirements]
        if build.index:
            arguments += ["--index-url", build.index]
        status, tail = self._run(new.python, "pip", arguments)
        if status:
            raise explained("Installing torch", tail)

    def _brought(self, wheel: Wheel, on_bytes: Callable[[int, int], None]) -> str:
        """What to tell pip for this wheel: a verified file, or its name where only pip may ask."""
        if wheel.local is not None:
            return str(wheel.local)
        if wheel.sha256:
            try:
                return str(Download(wheel, self._places.wheels, on_bytes).fetch())
            except RefusedFault as fault:
                self._report.line(f"{fault} Leaving this file to pip.")
        return f"{wheel.project}=={wheel.version}"

    def _verify(self, new: Environment) -> dict[str, object]:
        self._report.step("Trying it out", 0.92, 0.97)
        environ = dict(self._environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
        module, say = "assets.launcher.verify", self._report.log_only
        status, tail = self._children.run(new.python, module, [], environ, say, VERIFY_TIMEOUT_S)
        if status or not tail:
            raise explained("Trying out the new environment", tail)
        try:
            found = json.loads(tail[-1])
        except ValueError as error:
            raise explained("Trying out the new environment", tail) from error
        self._report.line(f"torch {found.get('torch')} works on {found.get('device')}.")
        return dict(found)

    def _run(
        self,
        python: Path | str,
        module: str,
        arguments: list[str],
        on_line: Callable[[str], None] | None = None,
    ) -> tuple[int, list[str]]:
        say = on_line or self._report.log_only
        return self._children.run(python, module, arguments, self._environ, say)

    def _check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self._places.data).free
        if free < needed_bytes:
            raise FolderFault(
                f"{self._places.data} has {free / 1e9:.1f} GB of free space; installing needs "
                f"{needed_bytes / 1e9:.1f} GB.",
                MAKE_ROOM,
            )


class _Meter:
    """Turns one file's bytes into the bar and the words of a whole download."""

    def __init__(self, report: Report, wheel: Wheel, before: int, total: int) -> None:
        self._report = report
        self._wheel = wheel
        self._before = before
        self._total = total
        self._started_at: tuple[float, int] | None = None

    def __call__(self, have: int, size: int) -> None:
        self._report.check_stopped()
        now = time.monotonic()
        if self._started_at is None:
            self._started_at = (now, have)
        since, first = self._started_at
        rate = (have - first) / max(0.2, now - since)
        total = max(self._total, self._before + size)
        done = self._before + have
        words = f"{self._wheel.project}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._report.progress(done, total, f"{words}, {rate / 1e6:.1f} MB/s")


def _some_pip() -> Path:
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
