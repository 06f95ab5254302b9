"""`bench load`: loading beside a plain read of the same bytes, peak memory beside the plan.

For every kind of file: the experts of each are random and lie in it as its own tools write them.
Everything happens in one fresh process, in turns, all of it into memory that has been touched
before: what the system asks for new pages depends on who gave them back. Files are read from a hot
page cache, and from the disk past it as those of models of more than a gigabyte are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.core import ExpertsWish, LoadProgress
from runtime.disk_direct import BOUNCE_BYTES, DirectFile
from runtime.store_loading import LOAD_READERS

if TYPE_CHECKING:
    from runtime.bench.load_files import Size

ROUNDS, DISK_ROUNDS = 7, 3
PIECE_BYTES = 2**25
CANCEL_AT = 0.3


@dataclass(frozen=True)
class Case:
    """A kind of file, and what its experts become; `kept` reads those that an earlier load made."""

    name: str
    stored: str
    experts: ExpertsWish = "as stored"
    kept: bool = False


CASES = (
    Case("bf16", "bf16"),
    Case("fp8", "fp8"),
    Case("mxfp4", "mxfp4"),
    Case("awq", "awq"),
    Case("gptq", "gptq"),
    Case("compressed-tensors int4", "compressed"),
    Case("gguf Q4_0", "Q4_0"),
    Case("gguf Q4_K", "Q4_K"),
    Case("gguf Q8_0", "Q8_0"),
    Case("bf16 to int8", "bf16", "int8"),
    Case("bf16 to int4", "bf16", "int4"),
    Case("kept int4", "bf16", "int4", kept=True),
)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a model in each format, load it a few times, and set the figures in line."""
    from runtime.bench.load_files import Size

    size = Size(layers=options.layers) if options.layers else Size()
    cases = []
    for case in CASES:
        say(f"{case.name}\n")
        cases += measure([case], ROUNDS, size)
    return {"rounds": ROUNDS, "cases": cases}


def measure(
    cases: Sequence[Case], rounds: int, size: Size, setup: str = ""
) -> list[dict[str, Any]]:
    """Load a model of each case in one process of its own; times are ratios of the shortest ones.

    Without rounds only memory is measured. `setup` is a statement that the process executes first.
    """
    from runtime.bench.load_files import write_model

    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for number, case in enumerate(cases):
            paths = []
            # The first one warms up what a process does once.
            for name, of_size in (("small", replace(size, layers=1, experts=4)), ("whole", size)):
                place = Path(folder) / f"{number}-{name}"
                place.mkdir()
                paths.append(str(write_model(place, case.stored, of_size)))
            tasks.append([asdict(case), *paths, str(Path(folder) / f"{number}-kept"), rounds])
        code = f"{setup}\nfrom runtime.bench.load import child; child()"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(tasks),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    results: list[dict[str, Any]] = json.loads(ran.stdout.rpartition("RESULT ")[2])
    return results


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    lines = [
        f"Shortest of {result['rounds']} turns from a hot page cache, {DISK_ROUNDS} from the disk:",
        f"{'':24}{'file':>8}{'time':>7}{'CPU':>7}{'disk':>7}{'peak':>7}{'bare':>7}"
        f"{'cancelled':>11}{'left':>9}",
    ]
    for case in result["cases"]:
        lines.append(
            f"{case['name']:24}{case['read_bytes'] / 1e6:5.0f} MB{case['experts_to_read']:7.2f}"
            f"{case['cpu_to_read']:7.2f}{_ratio(case['experts_to_disk_read']):>7}"
            f"{case['peak_to_plan']:7.3f}{case['peak_to_weights']:7.3f}"
            f"{case['cancel_s']:9.2f} s{case['left_bytes'] / 1e6:+6.0f} MB"
        )
    lines += [
        "time, CPU: reading the experts over one thread's plain read of the same bytes, by the",
        "clock and by what all its threads compute; disk: the same from the disk, past the cache,",
        f"over what {LOAD_READERS} threads need to read all files; peak: the most memory of a load",
        "over the plan; bare: over the weights alone, without what the plan gives to readers;",
        "left: what a cancelled load leaves behind.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"


def child() -> None:
    """Measure what standard input names; write one line that begins with RESULT."""
    results = [_measured(Case(**told), *rest) for told, *rest in json.load(sys.stdin)]
    sys.stdout.write("RESULT " + json.dumps(results) + "\n")


def _measured(case: Case, small: str, whole: str, kept_name: str, rounds: int) -> dict[str, Any]:
    import psutil
    import torch

    from runtime import store
    from runtime.device_host_memory import host_memory
    from runtime.errors import CancelledError
    from runtime.hardware_memory import give_back_memory
    from runtime.loader import load_model
    from runtime.store_recipes import bytes_in

    kept = Path(kept_name)
    torch.set_num_threads(1)

    def load(
        path: str = whole,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[LoadProgress], None] = lambda step: None,
        allocate: Callable[[int], Any] = host_memory,
    ) -> Any:
        if not case.kept:
            shutil.rmtree(kept, ignore_errors=True)
        return load_model(
            Path(path),
            torch_device=torch.device("cpu"),
            dtype=torch.bfloat16,
            allocate_host=allocate,
            progress=progress,
            cancelled=cancelled,
            experts=case.experts,
            kept=kept,
        )

    if case.kept:
        load().store.close()
    load(small).store.close()
    give_back_memory()
    before_bytes = _peak_bytes(reset=True)
    loaded = load()
    peak_bytes = _peak_bytes(reset=False) - before_bytes
    store_bytes, dense_bytes = loaded.store.ram_bytes, loaded.shape.dense_bytes
    planned_bytes = store_bytes + dense_bytes + loaded.shape.reading_bytes
    loaded.store.close()
    del loaded

    asked = threading.Event()
    cancelled_at_s: list[float] = []

    def watch(step: LoadProgress) -> None:
        if step.total_bytes and step.done_bytes > CANCEL_AT * step.total_bytes:
            if not asked.is_set():
                cancelled_at_s.append(time.perf_counter())
            asked.set()

    give_back_memory()
    before_bytes = psutil.Process().memory_info().rss
    try:
        load(whole, asked.is_set, watch)
    except CancelledError:
        pass
    cancel_s = time.perf_counter() - cancelled_at_s[0]
    give_back_memory()
    left_bytes = psutil.Process().memory_info().rss - before_bytes

    files = _files_of(Path(whole), kept if case.kept else None)
    read_bytes = sum(path.stat().st_size for path in files)
    result = {
        "name": case.name,
        "read_bytes": read_bytes,
        "weights_bytes": store_bytes + dense_bytes,
        "planned_bytes": planned_bytes,
        "peak_to_plan": peak_bytes / planned_bytes,
        "peak_to_weights": peak_bytes / (store_bytes + dense_bytes),
        "cancel_s": cancel_s,
        "left_bytes": left_bytes,
    }
    if not rounds:
        return result
    arena = host_memory(max(read_bytes, store_bytes))
    arena.fill_(1)

    def turns(count: int, read: Callable[[], float]) -> tuple[float, float, float]:
        """Return the shortest times of reading, of loading experts, and of computing meanwhile."""
        reads, loads, cpu = [], [], []
        for _ in range(count):
            reads.append(read())
            told: list[tuple[float, float]] = []
            load(progress=partial(_stamp_experts, told), allocate=_Arena(arena).block).store.close()
            loads.append(told[-1][0] - told[0][0])
            cpu.append(told[-1][1] - told[0][1])
        return min(reads), min(loads), min(cpu)

    hot_s, loads_s, cpu_s = turns(rounds, lambda: _plain_read_s(files, bytes_in(arena)))
    # Kept experts lie in a file of their own; others beside the dense weights.
    share = 1.0 if case.kept else 1 - dense_bytes / read_bytes
    result |= {"experts_to_read": loads_s / hot_s / share, "cpu_to_read": cpu_s / hot_s / share}
    store.DIRECT_FROM_BYTES = 0
    if not hasattr(os, "posix_fadvise"):
        return {**result, "experts_to_disk_read": None}
    disk_s, from_disk_s, _ = turns(min(rounds, DISK_ROUNDS), lambda: _disk_read_s(files))
    return {**result, "experts_to_disk_read": from_disk_s / disk_s / share}


class _Arena:
    """Gives out memory that has been touched before, block after block."""

    def __init__(self, memory: Any) -> None:
        self._left = memory

    def block(self, size_bytes: int) -> Any:
        block, self._left = self._left[:size_bytes], self._left[size_bytes:]
        return block


def _stamp_experts(stamps: list[tuple[float, float]], step: LoadProgress) -> None:
    if "experts" in step.text:
        stamps.append((time.perf_counter(), time.process_time()))


def _files_of(path: Path, kept: Path | None) -> list[Path]:
    """Return what a load reads: the file itself, a folder's weights, or the experts that were kept.

    Of the weights beside kept experts only the dense ones are read, which are few.
    """
    if kept is not None:
        return sorted(file for file in kept.rglob("*") if file.is_file() and file.stat().st_size)
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _plain_read_s(files: list[Path], into: memoryview) -> float:
    """Return how long reading all files takes, one after another into `into`."""
    began_s = time.perf_counter()
    done = 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(into[done : done + PIECE_BYTES]):
                done += count
    return time.perf_counter() - began_s


def _disk_read_s(files: list[Path]) -> float:
    """Return how long as many readers as a load has need for all files, past the page cache.

    Nothing is left of the files in the page cache, before and after.
    """
    for path in files:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began_s = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(LOAD_READERS) as readers:
            direct = DirectFile(file.fileno())
            begins = range(0, path.stat().st_size, BOUNCE_BYTES)
            into = threading.local()

            def read(begin: int, direct: DirectFile = direct, into: Any = into) -> None:
                if not hasattr(into, "buffer"):
                    into.buffer = memoryview(bytearray(BOUNCE_BYTES))
                direct.read_at([into.buffer], begin)

            for _ in readers.map(read, begins):
                pass
            direct.close()
    return time.perf_counter() - began_s


def _peak_bytes(*, reset: bool) -> int:
    """Return the most memory this process ever had, or has now if that is where it starts anew.

    Only where the system keeps such a figure; elsewhere what it has now.
    """
    import psutil

    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return int(psutil.Process(os.getpid()).memory_info().rss)
    if reset:
        clear.write_text("5")
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
