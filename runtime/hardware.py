"""What this machine has, found out once at start: RAM, the card, and how fast they really are.

Never raises and never waits long: a value that cannot be read, or is absurd, becomes an assumed
one and says so. The card is found by its UUID, since NVML and torch may number cards differently.
"""

from __future__ import annotations

import gc
import importlib
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.functional import linear

from runtime.core import EmulatedMachine, HardwareProfile, Reading
from runtime.hardware_memory import is_plausible, read_ram
from runtime.profiles import Memory, cpu_profile, emulated_profile

MIB = 2**20
NVML_LIMIT_S = 5.0
CUDA_LIMIT_S = 30.0
_BLOCK_BYTES = 64 * MIB
_EXPERT = (2048, 4096)
_CPU_MEASURE_S = 0.2
_AMPERE = (8, 0)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Card:
    """A CUDA card as one source describes it."""

    uuid: str
    name: str
    memory: Memory


def probe(emulated: EmulatedMachine | None) -> HardwareProfile:
    """Describe this machine; measures for at most about two seconds if it has a CUDA card.

    Without a usable card, `emulated` becomes the card; None means experts run on the CPU.
    """
    ram = read_ram()
    card = find_card()
    if card is not None:
        return _measured(card, ram)
    if emulated is not None:
        return emulated_profile(emulated, ram)
    return cpu_profile(cpu_name(), ram)


def card_present() -> bool:
    """Say whether torch sees a card, without touching it."""
    return bool(within(CUDA_LIMIT_S, torch.cuda.is_available))


def find_card() -> Card | None:
    """Return the card torch would use, or None if there is none that can be trusted."""
    from_torch = within(CUDA_LIMIT_S, _card_from_torch)
    if from_torch is None:
        return None
    return agree(from_torch, within(NVML_LIMIT_S, cards_from_nvml) or [])


def agree(from_torch: Card, from_nvml: list[Card]) -> Card | None:
    """Believe the lower free figure of those that make sense; None if none does."""
    readings = [from_torch.memory]
    readings += [card.memory for card in from_nvml if card.uuid == from_torch.uuid]
    sound = [memory for memory in readings if is_plausible(memory)]
    if not sound:
        return None
    total = min(memory.total_bytes for memory in sound)
    free = min(memory.free_bytes for memory in sound)
    return replace(from_torch, memory=Memory(total, min(free, total)))


def within(limit_s: float, function: Callable[[], _T]) -> _T | None:
    """Return what `function` returns, or None if it takes longer; a wedged driver may never end."""
    results: list[_T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None


def driver_version(nvml: Any = None) -> str | None:
    """Return the version of the cards' driver, or None if it cannot be read in time."""
    return within(NVML_LIMIT_S, lambda: _driver_version(nvml or _nvml()))


def _driver_version(nvml: Any) -> str | None:
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
        version = nvml.nvmlSystemGetDriverVersion()
        nvml.nvmlShutdown()
    except (nvml.NVMLError, OSError):
        return None
    return str(version)[:100]


def _nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def cards_from_nvml(nvml: Any = None) -> list[Card]:
    """Return every card NVML knows; empty if the library or the driver is missing or fails."""
    nvml = nvml or _nvml()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError, OSError):
        return []
    cards = []
    try:
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            uuid = str(nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-")
            name = str(nvml.nvmlDeviceGetName(handle))
            cards.append(Card(uuid, name, Memory(memory.total, memory.free)))
    except (nvml.NVMLError, OSError):
        return []
    finally:
        try:
            nvml.nvmlShutdown()
        except (nvml.NVMLError, OSError):
            cards = []
    return cards


def cpu_name() -> str:
    """Return what this machine's processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine() or "CPU"


def _card_from_torch() -> Card | None:
    try:
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # What an unloaded model left to torch's allocator is free for the next one.
        gc.collect()
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError, OSError):
        return None
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    return Card(uuid, properties.name, Memory(total_bytes, free_bytes))


def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _AMPERE


def _measured(card: Card, ram: Memory) -> HardwareProfile:
    """Measure what a plan needs to know; each figure on its own falls back to an assumed one."""
    profile = replace(
        cpu_profile(card.name, ram),
        device_kind="cuda",
        vram_total_bytes=card.memory.total_bytes,
        vram_free_bytes=card.memory.free_bytes,
    )
    device = torch.device("cuda", torch.cuda.current_device())
    profile = replace(profile, bfloat16=_has_bfloat16(device))
    measures: dict[str, Callable[[], float]] = {
        "link_bytes_per_s": lambda: _link_bytes_per_s(device, pinned=True),
        "link_unpinned_bytes_per_s": lambda: _link_bytes_per_s(device, pinned=False),
        "link_call_s": lambda: _link_call_s(device),
        "device_bytes_per_s": lambda: _device_bytes_per_s(device),
        "cpu_expert_bytes_per_s": lambda: _cpu_bytes_per_s(None),
        "cpu_expert_bytes_per_s_while_copying": lambda: _cpu_bytes_per_s(device),
        "cpu_call_s": _cpu_call_s,
    }
    readings: dict[str, Any] = {}
    for name, measure in measures.items():
        try:
            value = measure()
        except RuntimeError:  # Out of memory, no pinned memory, a driver that refuses.
            continue
        if 0.0 < value < 1e15:
            readings[name] = Reading(value, "measured")
    torch.cuda.empty_cache()
    return replace(profile, **readings)


def _link_bytes_per_s(device: torch.device, *, pinned: bool) -> float:
    host = torch.ones(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(host, device=device)
    target.copy_(host)
    return _BLOCK_BYTES / _fastest_s(lambda: target.copy_(host, non_blocking=pinned), 4)


def _link_call_s(device: torch.device) -> float:
    host = torch.ones(4096, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return _fastest_s(lambda: target.copy_(host, non_blocking=True), 50)


def _device_bytes_per_s(device: torch.device) -> float:
    # Together larger than any cache on the card, like the experts of a token.
    weights = torch.randn((16, *_EXPERT), dtype=torch.bfloat16, device=device)
    x = torch.randn((1, _EXPERT[1]), dtype=torch.bfloat16, device=device)

    def read_all() -> None:
        for weight in weights:
            linear(x, weight)

    read_all()
    return weights.nbytes / _fastest_s(read_all, 5)


def _cpu_bytes_per_s(copying_to: torch.device | None) -> float:
    weights = torch.ones((8, *_EXPERT), dtype=torch.bfloat16)
    x = torch.ones((1, _EXPERT[1]), dtype=torch.bfloat16)
    linear(x, weights[0])
    keep_copying = _endless_copies(copying_to) if copying_to is not None else None
    done_bytes, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < _CPU_MEASURE_S:
        for weight in weights:
            if keep_copying is not None:
                keep_copying()
            linear(x, weight)
        done_bytes += weights.nbytes
    rate = done_bytes / (time.perf_counter() - began_s)
    if copying_to is not None:
        torch.cuda.synchronize(copying_to)
    return rate


def _endless_copies(device: torch.device) -> Callable[[], None]:
    """Return what, called every few milliseconds, keeps the link busy."""
    host = torch.ones(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    half_way: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def keep_copying() -> None:
        if half_way.query():
            for block in range(4):
                target.copy_(host, non_blocking=True)
                if block == 1:
                    half_way.record()

    return keep_copying


def _cpu_call_s() -> float:
    x, weight = torch.ones((1, 64)), torch.ones((64, 64))
    began_s = time.perf_counter()
    for _ in range(200):
        linear(x, weight)
    return (time.perf_counter() - began_s) / 200


def _fastest_s(work: Callable[[], object], times: int) -> float:
    """Return the shortest of some runs, each waited for."""
    shortest = float("inf")
    for _ in range(times):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - began_s)
    return shortest
