"""How much memory can be pinned, asked of drivers that refuse, break, die and hang."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import hardware_pinning
from runtime.core import HardwareProfile
from runtime.errors import CancelledError
from runtime.hardware_pinning import (
    LEAST_BYTES,
    REFUSAL_KEPT_S,
    Pinning,
    measured,
    with_pinnable,
)
from runtime.hardware_pinning_child import LEAST_STEP_BYTES, pin_in_steps
from tests.machines import emulated_profile

MIB, GIB = 2**20, 2**30
CARD = replace(emulated_profile(), device_kind="cuda", device_name="a card")


class Allocator:
    """A driver that pins up to `limit_bytes`, and nothing at all once it has refused."""

    def __init__(self, limit_bytes: int) -> None:
        self.left_bytes = limit_bytes
        self.broken = False
        self.asked = 0

    def pin(self, size_bytes: int) -> bool:
        self.asked += 1
        self.broken = self.broken or size_bytes > self.left_bytes
        if not self.broken:
            self.left_bytes -= size_bytes
        return not self.broken


def said(wanted_bytes: int, allocator: Allocator) -> list[str]:
    lines: list[str] = []
    pin_in_steps(wanted_bytes, allocator.pin, lines.append)
    return lines


@pytest.mark.parametrize("limit_bytes", [0, 100 * MIB, GIB, 28 * GIB + 1])
def test_a_driver_that_refuses_is_asked_no_further(limit_bytes: int) -> None:
    wanted_bytes = 60 * GIB
    allocator = Allocator(limit_bytes)
    *steps, last = said(wanted_bytes, allocator)
    assert last == "refused"
    assert allocator.asked == len(steps) + 1
    reached = int(steps[-1].split()[1]) if steps else 0
    assert reached <= limit_bytes < reached + GIB


@pytest.mark.parametrize("wanted_bytes", [1, LEAST_STEP_BYTES, 5 * GIB + 3])
def test_what_is_wanted_is_reached_to_the_byte(wanted_bytes: int) -> None:
    *steps, last = said(wanted_bytes, Allocator(wanted_bytes))
    assert last == "enough"
    assert steps[-1] == f"pinned {wanted_bytes}"


def child(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def program_that_says(*lines: str, then: str = "") -> tuple[str, ...]:
    text = "".join(line + "\n" for line in lines)
    return child(f"import os, sys, time; sys.stdout.write({text!r}); sys.stdout.flush(); {then}")


@pytest.mark.parametrize(
    ("lines", "then", "found"),
    [
        (("pinned 500", "pinned 900", "refused"), "", Pinning(900, "refused")),
        (("refused",), "", Pinning(0, "refused")),
        (("pinned 500", "pinned 1000", "enough"), "", Pinning(1000, "enough")),
        (("pinned 500",), "os.abort()", Pinning(500, "died")),
        ((), "os._exit(1)", Pinning(0, "died")),
        (("pinned 500", "pinned 99999", "enough"), "", Pinning(1000, "enough")),
        (("enough",), "", Pinning(0, "died")),
        (
            ("some driver's banner", "pinned x", "pinned 700", "refused"),
            "",
            Pinning(700, "refused"),
        ),
    ],
)
def test_whatever_becomes_of_the_child_is_an_answer(
    lines: tuple[str, ...], then: str, found: Pinning
) -> None:
    assert measured(1000, 0, program_that_says(*lines, then=then)) == found


@pytest.mark.parametrize("lines", [(), ("pinned 500",)])
def test_a_child_that_hangs_is_ended_at_its_deadline(lines: tuple[str, ...]) -> None:
    began_s = time.monotonic()
    found = measured(1000, 0, program_that_says(*lines, then="time.sleep(600)"), deadline_s=2.0)
    assert found == Pinning(500 if lines else 0, "hung")
    assert time.monotonic() - began_s < 60


def test_the_real_child_without_a_card_is_a_dead_one() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert measured(GIB, 0) == Pinning(0, "died")


@pytest.mark.gpu
def test_the_real_child_pins_a_little() -> None:
    assert measured(128 * MIB, 64 * MIB) == Pinning(128 * MIB, "enough")


class Driver:
    """Counts how often it is asked."""

    def __init__(self, found: Pinning) -> None:
        self.found = found
        self.asked: list[tuple[int, int]] = []

    def __call__(self, wanted_bytes: int, device_bytes: int) -> Pinning:
        self.asked.append((wanted_bytes, device_bytes))
        return self.found


def asked(
    driver: Driver,
    folder: Path,
    *,
    version: str | None = "580.12",
    wanted_bytes: int = 50 * GIB,
    profile: HardwareProfile = CARD,
    now_s: float = 1e9,
) -> int | None:
    return with_pinnable(
        profile, wanted_bytes, 20 * GIB, lambda: version, folder, driver, now_s=lambda: now_s
    ).pinnable_bytes


def test_a_refusal_is_kept_until_driver_or_memory_change(tmp_path: Path) -> None:
    driver = Driver(Pinning(12 * GIB, "refused"))
    for wanted_bytes in (50 * GIB, 60 * GIB, 13 * GIB, 5 * GIB):
        assert asked(driver, tmp_path, wanted_bytes=wanted_bytes) == 12 * GIB
    assert driver.asked == [(50 * GIB, 20 * GIB)]
    driver.found = Pinning(16 * GIB, "refused")
    assert asked(driver, tmp_path, version="581.0") == 16 * GIB
    more_ram = replace(CARD, ram_total_bytes=CARD.ram_total_bytes * 2)
    assert asked(driver, tmp_path, version="581.0", profile=more_ram) == 16 * GIB
    assert len(driver.asked) == 3


def test_a_refusal_is_old_some_day_and_a_clock_set_back_makes_it_so_too(tmp_path: Path) -> None:
    driver = Driver(Pinning(12 * GIB, "refused"))
    began_s = 1e9
    for after_s, times in ((0.0, 1), (REFUSAL_KEPT_S - 1, 1), (REFUSAL_KEPT_S + 1, 2), (-5.0, 3)):
        assert asked(driver, tmp_path, now_s=began_s + after_s) == 12 * GIB
        assert len(driver.asked) == times


def test_who_cancels_does_not_wait_for_the_driver() -> None:
    began_s = time.monotonic()
    hangs = program_that_says("pinned 500", then="time.sleep(600)")
    with pytest.raises(CancelledError):
        measured(1000, 0, hangs, cancelled=lambda: time.monotonic() > began_s + 1.0)
    assert time.monotonic() - began_s < 5.0


def test_an_earlier_child_is_waited_for_until_it_has_given_its_memory_back() -> None:
    slow = child("import time; time.sleep(1.5)")
    answers = program_that_says("pinned 1000", "enough")
    hardware_pinning._GIVING_BACK.append(subprocess.Popen(slow))
    began_s = time.monotonic()
    with pytest.raises(CancelledError):
        measured(1000, 0, answers, cancelled=lambda: True)
    assert time.monotonic() - began_s < 1.0
    assert measured(1000, 0, answers) == Pinning(1000, "enough")
    assert time.monotonic() - began_s > 1.0
    assert not hardware_pinning._GIVING_BACK


def test_enough_is_no_limit_and_is_asked_again_only_for_more(tmp_path: Path) -> None:
    driver = Driver(Pinning(50 * GIB, "enough"))
    assert asked(driver, tmp_path) is None
    assert asked(driver, tmp_path, wanted_bytes=40 * GIB) is None
    assert len(driver.asked) == 1
    driver.found = Pinning(52 * GIB, "refused")
    assert asked(driver, tmp_path, wanted_bytes=60 * GIB) == 52 * GIB
    assert len(driver.asked) == 2


@pytest.mark.parametrize("ended", ["died", "hung"])
def test_a_child_that_broke_counts_for_this_load_only(ended: str, tmp_path: Path) -> None:
    driver = Driver(Pinning(3 * GIB, ended))  # type: ignore[arg-type]
    assert asked(driver, tmp_path) == 3 * GIB
    assert asked(driver, tmp_path) == 3 * GIB
    assert len(driver.asked) == 2


def test_nothing_is_kept_for_a_driver_without_a_version(tmp_path: Path) -> None:
    driver = Driver(Pinning(12 * GIB, "refused"))
    assert asked(driver, tmp_path, version=None) == 12 * GIB
    assert asked(driver, tmp_path, version=None) == 12 * GIB
    assert len(driver.asked) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 9}', "\x00" * 9000, "null", '"a"']
)
def test_a_damaged_file_is_measured_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "pinning.json").write_text(text)
    driver = Driver(Pinning(GIB, "refused"))
    assert asked(driver, tmp_path) == GIB
    assert asked(driver, tmp_path) == GIB
    assert len(driver.asked) == 1


def test_without_a_card_or_for_little_nobody_is_asked(tmp_path: Path) -> None:
    driver = Driver(Pinning(0, "refused"))
    assert asked(driver, tmp_path, profile=emulated_profile()) is None
    assert asked(driver, tmp_path, wanted_bytes=LEAST_BYTES - 1) is None
    assert not driver.asked
    unwritable = tmp_path / "missing" / "folder"
    assert asked(driver, unwritable) == 0
