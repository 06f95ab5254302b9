"""Paired trials: what pays stays on, what hurts goes off, and finding out costs little."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from runtime.controller import CAREFUL, FIRST_AFTER_PASSES, FULL, OFF, Controller

TRIAL_PASSES = 80


def serve(
    controller: Controller, passes: int, seconds: Callable[[int, int], float], tokens: int = 1
) -> list[int]:
    """Run decode passes that take `seconds(number, look_ahead)`; return what was chosen."""
    now_s, chosen = 0.0, []
    for number in range(passes):
        chosen.append(controller.begin_pass(now_s, tokens, prompt=False))
        now_s += seconds(number, chosen[-1])
    return chosen


def machine(without_s: float, with_s: float, noise: float = 0.02) -> Callable[[int, int], float]:
    draw = random.Random(4)

    def seconds(number: int, look_ahead: int) -> float:
        return (with_s if look_ahead else without_s) * (1 + noise * draw.uniform(-1, 1))

    return seconds


@pytest.mark.parametrize(
    ("without_s", "with_s", "expected"),
    [(0.020, 0.018, FULL), (0.018, 0.020, OFF), (0.02, 0.02, CAREFUL)],
)
def test_the_verdict_follows_what_was_measured(
    without_s: float, with_s: float, expected: int
) -> None:
    controller = Controller()
    chosen = serve(controller, FIRST_AFTER_PASSES + TRIAL_PASSES + 30, machine(without_s, with_s))
    assert controller.verdict.look_ahead == expected
    assert chosen[-1] == expected
    assert controller.verdict.pair is not None
    slow, fast = controller.verdict.pair
    assert slow == pytest.approx(1 / without_s, rel=0.02)
    assert fast == pytest.approx(1 / with_s, rel=0.02)


def test_speeds_are_tokens_of_all_sequences() -> None:
    controller = Controller()
    serve(controller, 200, machine(0.2, 0.1), tokens=4)
    assert controller.verdict.pair == (pytest.approx(20, rel=0.02), pytest.approx(40, rel=0.02))


def test_a_machine_that_slows_down_by_itself_deceives_nobody() -> None:
    """A chat that grows slower with its length must not decide for whoever came first."""
    controller = Controller()
    steady = machine(0.02, 0.02, noise=0.005)
    serve(controller, 180, lambda number, on: steady(number, on) * (1 + number / 200))
    assert controller.verdict.look_ahead == CAREFUL


def test_it_is_copied_ahead_until_something_is_known() -> None:
    controller = Controller()
    assert set(serve(controller, FIRST_AFTER_PASSES, machine(1, 2))) == {FULL}
    assert controller.verdict.pair is None
    assert "not measured" in controller.verdict.text.lower()


def test_prompts_and_newcomers_begin_a_block_anew() -> None:
    """Passes of another kind among the measured ones must not reach the comparison."""
    controller, now_s = Controller(), 0.0
    steady = machine(0.02, 0.01)
    for number in range(500):
        foreign = number % 13 == 0
        on = controller.begin_pass(now_s, 700 if foreign else 1, prompt=foreign)
        now_s += 5.0 if foreign else steady(number, on)
    assert controller.verdict.pair == (pytest.approx(50, rel=0.03), pytest.approx(100, rel=0.03))


def test_trials_take_a_small_share_that_shrinks() -> None:
    controller = Controller()
    chosen = serve(controller, 20_000, machine(0.02, 0.018))
    off = [number for number, choice in enumerate(chosen) if choice == OFF]
    assert len(off) / len(chosen) < 0.02
    assert sum(number >= 10_000 for number in off) < sum(number < 10_000 for number in off)


def test_a_verdict_is_looked_at_again_when_the_machine_changes() -> None:
    controller = Controller()
    before, after = machine(0.018, 0.02), machine(0.02, 0.018)
    chosen = serve(controller, 4000, lambda n, on: (before if n < 400 else after)(n, on))
    assert chosen[300] == OFF
    assert chosen[-1] == FULL
