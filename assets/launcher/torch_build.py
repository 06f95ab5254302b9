"""Which build of torch suits this computer, where it comes from, and what it weighs.

torch is one version in many builds: for the CPU, for CUDA 13.0, for CUDA 12.6. The default index
has the CUDA build for Linux and the CPU build for Windows and macOS; PyTorch's own index has all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from assets.launcher.children import Children
from assets.launcher.download import Wheel, remote_size
from assets.launcher.faults import explained
from assets.launcher.gpu import Gpu

PYTORCH_INDEX = "https://download.pytorch.org/whl/"
CONSENT_ABOVE_BYTES = 1_000_000_000
# A server that is there answers in this time; one that is not must not keep a person waiting. One
# retry, because pip tells of a broken connection only when it tries again.
INDEX_TIMEOUT_S = 6
INDEX_RETRIES = 1


@dataclass(frozen=True)
class Build:
    """One place to get torch from. `index` None means the index pip is configured for."""

    name: str
    index: str | None
    pin_suffix: str = ""

    @property
    def where(self) -> str:
        return "PyTorch's own index" if self.index else "the configured package index"


CONFIGURED = Build("configured", None)


def pytorch(name: str) -> Build:
    return Build(name, PYTORCH_INDEX + name, f"+{name}")


def suitable(gpu: Gpu | None, system: str, override: str = "") -> list[Build]:
    """Builds to try in this order; the first is the one this computer should have.

    CUDA 13 builds need a driver for CUDA 13 and a card of capability 7.5; CUDA 12 builds run on
    any driver for CUDA 12. `override` is PRESCOPE_TORCH: cpu, cu130, cu126, configured, ...
    """
    override = override.strip().lower()
    if override == CONFIGURED.name or system == "Darwin":
        return [CONFIGURED]
    if override:
        return [pytorch(override), CONFIGURED]
    if gpu is None or gpu.driver_cuda < (12, 0) or gpu.capability < (5, 0):
        return [pytorch("cpu"), CONFIGURED] if system == "Linux" else [CONFIGURED]
    if gpu.driver_cuda >= (13, 0) and gpu.capability >= (7, 5):
        # On Linux the default index's build is the CUDA 13 one.
        if system == "Linux":
            return [Build("cu130", None), pytorch("cpu")]
        return [pytorch("cu130"), CONFIGURED]
    # The default index's build for Linux would not run on this driver or card.
    last = pytorch("cpu") if system == "Linux" else CONFIGURED
    return [pytorch("cu126"), last]


def resolve(
    build: Build,
    python: Path,
    lock: Path,
    children: Children,
    environ: Mapping[str, str],
    on_line: Callable[[str], None],
    scratch: Path,
) -> list[Wheel]:
    """The wheels that are missing from `python`'s environment for this build, with their sizes.

    pip decides, with every setting the person gave it, and downloads no wheel for that where the
    index serves metadata. Raises `Fault` when the index cannot be reached or has no such build.
    """
    pin = next(line for line in lock.read_text("utf-8").splitlines() if line.startswith("torch=="))
    answer = scratch / "torch-plan.json"
    arguments = ["install", "--dry-run", "--report", str(answer), "--only-binary=:all:"]
    arguments += ["--constraint", str(lock), pin.split()[0] + build.pin_suffix]
    if build.index:
        arguments += ["--index-url", build.index]
        arguments += ["--retries", str(INDEX_RETRIES), "--timeout", str(INDEX_TIMEOUT_S)]
    status, tail = children.run(python, "pip", arguments, environ, on_line)
    if status:
        raise explained(f"Looking for torch ({build.name}) in {build.where}", tail)
    plan = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return [_wheel(item) for item in plan["install"]]


def _wheel(item: dict[str, dict[str, object]]) -> Wheel:
    about, origin = item["metadata"], item["download_info"]
    archive = origin.get("archive_info")
    hashes = archive.get("hashes", {}) if isinstance(archive, dict) else {}
    url = str(origin["url"])
    wheel = Wheel(str(about["name"]), str(about["version"]), url, str(hashes.get("sha256", "")))
    size = wheel.local.stat().st_size if wheel.local else remote_size(url)
    return Wheel(wheel.project, wheel.version, wheel.url, wheel.sha256, size)


def bytes_to_fetch(wheels: list[Wheel], folder: Path) -> int:
    """What still has to come over the network, pieces of earlier attempts taken off."""
    total = 0
    for wheel in wheels:
        part = folder / (wheel.file_name + ".part")
        here = part.stat().st_size if part.exists() else 0
        if wheel.local is None and not (folder / wheel.file_name).exists():
            total += max(0, wheel.size_bytes - here)
    return total
