"""`CudaDevice` on a machine without a card: its own code, over streams and events that only log.

Everything is computed at once on the CPU, so this shows what the device asks for and in which
order, never how long it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import PAGESIZE
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.core import HardwareProfile

REFUSED = 801


class Log:
    """What was asked of the stand-in, in order: ("record", stream, event) and the like."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.pins: list[int] = []
        self.may_pin: Callable[[int], bool] = lambda size_bytes: True
        self.numbers = itertools.count()

    def __call__(self, *entry: Any) -> None:
        self.entries.append(entry)


def cuda_device(patch: pytest.MonkeyPatch, profile: HardwareProfile) -> tuple[Any, Log]:
    """Return a `CudaDevice` whose tensors are the CPU's, and its log."""
    from runtime.device_cuda import CudaDevice

    log = Log()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.number = next(log.numbers)

        def wait_event(self, event: Event) -> None:
            log("wait", self.number, event.number)

        def wait_stream(self, stream: Any) -> None:
            log("wait for stream", self.number)

        def synchronize(self) -> None:
            log("synchronize stream", self.number)

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.timed, self.number, self.at_ms = enable_timing, next(log.numbers), None

        def record(self, stream: Stream) -> None:
            self.at_ms = next(log.numbers)
            log("record", stream.number, self.number)

        def synchronize(self) -> None:
            log("synchronize", self.number)

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            assert self.timed
            assert end.timed
            assert self.at_ms is not None
            assert end.at_ms is not None
            return float(end.at_ms - self.at_ms)

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        log("enter", stream.number)
        yield
        log("leave", stream.number)

    pages: dict[int, range] = {}

    def register(address: int, size_bytes: int, flags: int) -> int:
        log.pins.append(size_bytes)
        taken = range(address // PAGESIZE, -(-(address + size_bytes) // PAGESIZE))
        for other in pages.values():
            assert taken[-1] < other[0] or other[-1] < taken[0], "a page is registered twice"
        if not log.may_pin(size_bytes):
            return REFUSED
        pages[address] = taken
        return 0

    def unregister(address: int) -> int:
        del pages[address]
        return 0

    fakes: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": entered,
        "current_device": lambda: 0,
        "current_stream": lambda device: Stream(device),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=24 << 30),
        "set_per_process_memory_fraction": lambda share, device: None,
        "empty_cache": lambda: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister),
    }
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    device = CudaDevice(profile, 8 << 30)
    device.torch_device = torch.device("cpu")
    return device, log
