"""The probe survives missing, lying, absurd and hanging sources, and never invents a figure."""

from __future__ import annotations

import math
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import hardware
from runtime.core import EmulatedMachine, HardwareProfile, Reading
from runtime.hardware import Card, agree, cards_from_nvml, driver_version, within
from runtime.hardware_memory import is_plausible, read_ram
from runtime.profiles import Memory

GIB = 2**30


class NvmlError(Exception):
    pass


class FakeNvml:
    """NVML with two cards in another order than torch's; `broken` names the call that fails."""

    NVMLError = NvmlError

    def __init__(self, broken: str = "", free: Any = 7 * GIB) -> None:
        self.broken = broken
        self.cards = [("GPU-other", 4 * GIB, 4 * GIB), ("GPU-mine", 12 * GIB, free)]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if name == self.broken:
                raise NvmlError(name)
            if name == "nvmlDeviceGetCount":
                return len(self.cards)
            if name == "nvmlDeviceGetHandleByIndex":
                return args[0]
            if name == "nvmlDeviceGetUUID":
                return self.cards[args[0]][0]
            if name == "nvmlDeviceGetMemoryInfo":
                return SimpleNamespace(total=self.cards[args[0]][1], free=self.cards[args[0]][2])
            return "a card"

        return call


MINE = Card("mine", "a card", Memory(12 * GIB, 9 * GIB))


def test_cards_are_matched_by_uuid_and_the_lower_free_value_wins() -> None:
    assert agree(MINE, cards_from_nvml(FakeNvml())) == Card(
        "mine", "a card", Memory(12 * GIB, 7 * GIB)
    )
    assert agree(MINE, cards_from_nvml(FakeNvml(free=10 * GIB))) == MINE
    assert agree(MINE, []) == MINE


@pytest.mark.parametrize(
    "broken",
    [
        "nvmlInit",
        "nvmlDeviceGetCount",
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetUUID",
        "nvmlShutdown",
    ],
)
def test_an_nvml_that_fails_anywhere_knows_no_cards(broken: str) -> None:
    assert cards_from_nvml(FakeNvml(broken)) == []


def test_a_machine_without_nvml_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert cards_from_nvml() == []


@pytest.mark.parametrize(
    "absurd", [-1, 2**64 - 1, 13 * GIB, math.nan, math.inf, "N/A", None, True, 1.5]
)
def test_absurd_figures_are_not_believed(absurd: Any) -> None:
    assert agree(MINE, cards_from_nvml(FakeNvml(free=absurd))) == MINE
    lying = Card("mine", "a card", Memory(12 * GIB, absurd))
    assert agree(lying, []) is None
    assert agree(lying, cards_from_nvml(FakeNvml())) == Card(
        "mine", "a card", Memory(12 * GIB, 7 * GIB)
    )


@given(st.integers(), st.integers(), st.integers(), st.integers())
def test_what_is_believed_is_always_plausible(a: int, b: int, c: int, d: int) -> None:
    believed = agree(Card("x", "", Memory(a, b)), [Card("x", "", Memory(c, d))])
    assert believed is None or is_plausible(believed.memory)


def test_a_probe_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    assert within(0.05, release.wait) is None  # It would wait for ever.
    release.set()
    assert within(60, lambda: 7) == 7


def test_a_hanging_nvml_costs_its_limit_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(hardware, "NVML_LIMIT_S", 0.05)
    monkeypatch.setattr(hardware, "_card_from_torch", lambda: MINE)
    monkeypatch.setattr(hardware, "cards_from_nvml", lambda: [] if release.wait(30) else [])
    assert hardware.find_card() == MINE
    release.set()


def test_what_an_unloaded_model_left_is_given_back_before_memory_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        def __init__(self) -> None:
            self.itself = self

    model = weakref.ref(Model())
    left = [5 * GIB]

    def empty_cache() -> None:
        if model() is None:
            left[0] = 0

    properties = SimpleNamespace(name="a card", uuid="GPU-mine")
    for name, answer in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda number: properties,
        "empty_cache": empty_cache,
        "mem_get_info": lambda: (12 * GIB - left[0], 12 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert hardware._card_from_torch() == Card("mine", "a card", Memory(12 * GIB, 12 * GIB))


def machine(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    figures = SimpleNamespace(total=total, available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: figures)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (64, 40)),
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/memory.max": "max\n"}, (64, 40)),
        (
            {f"{CGROUP}/memory.max": f"{8 * GIB}\n", f"{CGROUP}/memory.current": f"{3 * GIB}\n"},
            (8, 5),
        ),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                f"{CGROUP}/user/memory.max": f"{16 * GIB}",
                f"{CGROUP}/user/memory.current": f"{10 * GIB}",
                f"{CGROUP}/user/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
                f"{CGROUP}/user/app/memory.max": "max",
                f"{CGROUP}/user/app/memory.current": f"{GIB}",
            },
            (16, 8),
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/x\n1:cpu:/\n",
                f"{CGROUP}/memory/docker/x/memory.limit_in_bytes": f"{4 * GIB}",
                f"{CGROUP}/memory/docker/x/memory.usage_in_bytes": f"{5 * GIB}",
            },
            (4, 0),
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/\n",
                f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712",
                f"{CGROUP}/memory/memory.usage_in_bytes": "5",
            },
            (64, 40),
        ),
        ({"proc/self/cgroup": "garbage", f"{CGROUP}/memory.max": "many"}, (64, 40)),
    ],
)
def test_ram_is_what_the_control_group_leaves(
    files: dict[str, str],
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, 64 * GIB, 40 * GIB)
    write(tmp_path, files)
    assert read_ram(tmp_path) == Memory(expected[0] * GIB, expected[1] * GIB)


def test_unknown_ram_is_said_to_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, -5, 3)
    assert read_ram(tmp_path) == Memory(0, 0)


def readings(profile: HardwareProfile) -> dict[str, Reading]:
    return {k: v for k, v in vars(profile).items() if isinstance(v, Reading)}


def test_without_a_card_the_default_model_gets_the_emulated_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "find_card", lambda: None)
    chosen = EmulatedMachine(link_bytes_per_s=5e6, vram_bytes=123)
    profile = hardware.probe(chosen)
    assert profile.device_kind == "emulated"
    assert profile.link_bytes_per_s == Reading(5e6, "emulated")
    assert profile.vram_total_bytes == profile.vram_free_bytes == 123
    assert all(reading.source != "measured" for reading in readings(profile).values())
    assert profile.ram_free_bytes > 0


def test_without_a_card_other_models_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "find_card", lambda: None)
    profile = hardware.probe(None)
    assert profile.device_kind == "cpu"
    assert profile.vram_total_bytes == 0
    assert {reading.source for reading in readings(profile).values()} == {"assumed"}
    assert profile.device_name


def test_a_card_that_refuses_every_measurement_gets_assumed_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> float:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(hardware, "find_card", lambda: MINE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hardware, "_has_bfloat16", lambda device: True)
    for name in ("_link_bytes_per_s", "_link_call_s", "_device_bytes_per_s", "_cpu_bytes_per_s"):
        monkeypatch.setattr(hardware, name, refuse)
    profile = hardware.probe(EmulatedMachine())
    assert profile.device_kind == "cuda"
    assert profile.vram_free_bytes == 9 * GIB
    assert profile.link_bytes_per_s.source == "assumed"
    assert profile.cpu_call_s.source == "measured"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_is_measured_quickly() -> None:
    hardware.find_card()
    began_s = time.monotonic()
    profile = hardware.probe(None)
    assert time.monotonic() - began_s < 4
    assert profile.device_kind == "cuda"
    assert 0 < profile.vram_free_bytes <= profile.vram_total_bytes
    assert profile.link_bytes_per_s.source == "measured"
    assert profile.link_bytes_per_s.value > 1e9
    assert profile.device_bytes_per_s.value > profile.link_bytes_per_s.value


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlShutdown"])
def test_a_driver_whose_version_cannot_be_read_has_none(broken: str) -> None:
    assert driver_version(FakeNvml(broken)) is None
    assert driver_version(FakeNvml()) == "a card"
