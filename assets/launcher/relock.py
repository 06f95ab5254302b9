"""Writes assets/lock/ from pyproject.toml, or checks that the lock has a wheel for everybody.

    python3 -m assets.launcher.relock            write the lock again
    python3 -m assets.launcher.relock --check    look for a wheel of every pin on every platform

Needs `uv` on PATH (it can resolve for all platforms at once) and the network. Three files come out:

requirements.txt  everything but torch, with hashes; installed as it stands, nothing is resolved
torch.txt         torch and the CUDA packages, without hashes: which build of torch is right is
                  decided on the person's machine, and the index that serves it names its sha256
test.txt          what `launcher.py test` needs on top, with hashes

pip.txt is kept by hand: it is one line and its hashes come from the index's own page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "assets" / "lock"
OLDEST = "3.10"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = (
    "x86_64-manylinux_2_28",
    "aarch64-manylinux_2_28",
    "x86_64-pc-windows-msvc",
    "aarch64-apple-darwin",
)
# Terms of a marker that hold wherever the launcher runs at all; uv writes them into every line.
ALWAYS_TRUE = ("python_full_version < '3.15'", "sys_platform != 'emscripten'")
TORCH_GROUP = re.compile(r"(torch|triton|cuda-.+|nvidia-(?!ml-py).+)==")


def compiled(*arguments: str) -> list[str]:
    """One block of text per package: its pin, its marker, its hashes."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", OLDEST, "--quiet"]
    command += ["--no-header", "--no-annotate", "--generate-hashes", *arguments, "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.split(r"\n(?=\S)", simplified(done.stdout).strip())


def simplified(text: str) -> str:
    for term in ALWAYS_TRUE:
        for around in (f"{term} and ", f" and {term}", f" ; {term}"):
            text = text.replace(around, "")
    return text


def write(name: str, about: str, blocks: list[str]) -> None:
    head = f"# {about}\n# Written by assets/launcher/relock.py; change pyproject.toml instead.\n"
    (LOCK / name).write_text(head + "\n".join(blocks) + "\n", encoding="utf-8")
    print(f"{name}: {len(blocks)} pins")


def relock() -> None:
    everything = compiled()
    torch = [block for block in everything if TORCH_GROUP.match(block)]
    app = [block for block in everything if block not in torch]
    test = [block for block in compiled("--extra", "test") if block not in everything]
    write("requirements.txt", "The app and the engine, without torch.", app)
    bare = [block.split(" \\\n")[0] for block in torch]
    write("torch.txt", "torch, and its CUDA packages where the chosen build has any.", bare)
    write("test.txt", "What `launcher.py test` needs on top.", test)


def check() -> int:
    """The number of (Python, platform) pairs for which some pin has no wheel."""
    failures = 0
    for python in PYTHONS:
        for platform in PLATFORMS:
            command = ["uv", "pip", "compile", "--quiet", "--only-binary", ":all:", "--no-header"]
            command += ["--python-version", python, "--python-platform", platform]
            command += ["requirements.txt", "torch.txt", "test.txt"]
            environ = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
            done = subprocess.run(
                command, cwd=LOCK, env=environ, capture_output=True, text=True, check=False
            )
            failures += done.returncode != 0
            print(python, platform, done.stderr.strip() or "ok")
    return failures


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(1 if check() else 0)
    relock()
