"""Bringing the chosen build of torch into an environment, by the first source that has it."""

from __future__ import annotations

import time
from collections.abc import Callable

from assets.launcher import torch_build
from assets.launcher.download import Download, RefusedFault, Wheel
from assets.launcher.environment import Environment
from assets.launcher.faults import ConsentFault, Fault, FolderFault, InstallFault, explained
from assets.launcher.report import Question, Report
from assets.launcher.torch_build import Build
from assets.launcher.workshop import QUICKLY, Workshop

# Measured on Linux's CPU build; the CUDA packages unpack to less.
UNPACKED_PER_WHEEL_BYTE = 4.0


def install_torch(shop: Workshop, new: Environment, builds: list[Build]) -> tuple[Build, str]:
    """The first build that can be had, and a remark where it is not the first choice."""
    note = ""
    for build in builds:
        is_last = build is builds[-1]
        shop.report.step(f"Choosing torch for this computer ({build.name})", 0.35, 0.4)
        try:
            wheels = torch_build.resolve(
                build,
                new.python,
                shop.lock_folder / "torch.txt",
                shop.children,
                shop.environ,
                shop.report.log_only,
                shop.places.run,
            )
            agree(shop, build, wheels, alternatives=not is_last)
            install_wheels(shop, new, build, wheels)
            return build, note
        except Fault as fault:
            if isinstance(fault, FolderFault) or is_last:
                raise
            shop.report.line(f"{fault} Trying another source.")
            note = f"Not the first choice of torch ({builds[0].name}): {fault}"
    raise InstallFault("There is no build of torch to try.", "Unset PRESCOPE_TORCH, then retry.")


def agree(shop: Workshop, build: Build, wheels: list[Wheel], alternatives: bool) -> None:
    """Nobody's connection or disk is filled without a yes."""
    size = torch_build.bytes_to_fetch(wheels, shop.places.wheels)
    unpacked = sum(wheel.size_bytes for wheel in wheels) * UNPACKED_PER_WHEEL_BYTE
    shop.check_room(size + int(unpacked))
    if size <= torch_build.CONSENT_ABOVE_BYTES:
        return
    download = f"{size / 1e9:.1f} GB"
    text = (
        f"torch ({build.name}) is a download of {download} in {len(wheels)} files from "
        f"{build.where}."
    )
    no = "Use the CPU build instead" if alternatives else "Stop here"
    if not shop.report.ask(Question(text, f"Download {download}", no)):
        raise ConsentFault(f"{text} That was declined.", "Retry to be asked again.")


def install_wheels(shop: Workshop, new: Environment, build: Build, wheels: list[Wheel]) -> None:
    shop.report.step("Downloading torch", 0.4, 0.82)
    total = sum(wheel.size_bytes for wheel in wheels)
    requirements, before = [], 0
    for wheel in wheels:
        requirements.append(brought(shop, wheel, Meter(shop.report, wheel, before, total)))
        before += wheel.size_bytes
    shop.report.step("Installing torch", 0.82, 0.92)
    arguments = ["install", "--no-deps", "--only-binary=:all:", *QUICKLY, *requirements]
    if build.index:
        arguments += ["--index-url", build.index]
    status, tail = shop.run(new.python, "pip", arguments)
    if status:
        raise explained("Installing torch", tail)


def brought(shop: Workshop, wheel: Wheel, on_bytes: Callable[[int, int], None]) -> str:
    """What to tell pip for this wheel: a verified file, or its name where only pip may ask."""
    if wheel.local is not None:
        return str(wheel.local)
    if wheel.sha256:
        try:
            return str(Download(wheel, shop.places.wheels, on_bytes).fetch())
        except RefusedFault as fault:
            shop.report.line(f"{fault} Leaving this file to pip.")
    return f"{wheel.project}=={wheel.version}"


class Meter:
    """Turns one file's bytes into the bar and the words of a whole download."""

    def __init__(self, report: Report, wheel: Wheel, before: int, total: int) -> None:
        self._report = report
        self._wheel = wheel
        self._before = before
        self._total = total
        self._first: tuple[float, int] | None = None

    def __call__(self, have: int, size: int) -> None:
        self._report.check_stopped()
        now = time.monotonic()
        if self._first is None:
            self._first = (now, have)
        since, at_first = self._first
        rate = (have - at_first) / max(0.2, now - since)
        total = max(self._total, self._before + size)
        done = self._before + have
        words = f"{self._wheel.project}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._report.progress(done, total, f"{words}, {rate / 1e6:.1f} MB/s")
