"""A guess is worth what such guesses were worth before."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from runtime.calibration import Calibration
from runtime.trace import Guess, Prediction


def worth_of(calibration: Calibration, prediction: Prediction) -> dict[int, float]:
    experts, worth = calibration.note(prediction)
    return dict(zip(experts.tolist(), worth.tolist(), strict=True))


def test_before_anything_was_seen_a_score_counts_for_what_it_says() -> None:
    worth = worth_of(Calibration(), Prediction.of(3, 1, (Guess(7, 0.8), Guess(2, 0.1))))
    assert worth == {7: pytest.approx(0.8), 2: pytest.approx(0.1)}


def test_a_boaster_is_believed_less_and_a_modest_one_more() -> None:
    draw = random.Random(1)
    calibration = Calibration()
    for _ in range(300):
        calibration.note(Prediction.of(0, 1, (Guess(1, 0.95), Guess(2, 0.15))))
        chosen = {e for e, p in ((1, 0.4), (2, 0.6)) if draw.random() < p}
        calibration.learn(0, np.array(sorted(chosen), np.int64))
    worth = worth_of(calibration, Prediction.of(0, 1, (Guess(1, 0.95), Guess(2, 0.15))))
    assert worth[1] == pytest.approx(0.4, abs=0.08)
    assert worth[2] == pytest.approx(0.6, abs=0.08)


def test_distances_are_judged_apart() -> None:
    calibration = Calibration()
    for _ in range(200):
        calibration.note(Prediction.of(0, 1, (Guess(1, 0.5),)))
        calibration.note(Prediction.of(0, 2, (Guess(2, 0.5),)))
        calibration.learn(0, np.array([1]))
    near = worth_of(calibration, Prediction.of(0, 1, (Guess(1, 0.5),)))
    far = worth_of(calibration, Prediction.of(0, 2, (Guess(1, 0.5),)))
    assert near[1] > 0.9
    assert far[1] < 0.1


def test_it_follows_a_predictor_that_changes() -> None:
    calibration = Calibration()
    for came_true in (True, False):
        for _ in range(6000):
            calibration.note(Prediction.of(0, 1, (Guess(1, 0.5),)))
            calibration.learn(0, np.array([1] if came_true else [], np.int64))
    assert worth_of(calibration, Prediction.of(0, 1, (Guess(1, 0.5),)))[1] < 0.25


def test_what_came_true_more_often_comes_first_and_equals_stay_in_order() -> None:
    """The order against plain sorting, for guesses whose scores say the contrary of the truth."""
    draw = random.Random(3)
    calibration = Calibration()
    for _ in range(400):
        scores = sorted((draw.random() for _ in range(24)), reverse=True)
        guesses = [Guess(number, score) for number, score in enumerate(scores)]
        experts, worth = calibration.note(Prediction.of(0, 1, guesses))
        assert sorted(experts.tolist()) == list(range(24))
        by_expert = dict(zip(experts.tolist(), worth.tolist(), strict=True))
        in_order = sorted(range(24), key=lambda each: -by_expert[each])
        assert experts.tolist() == in_order
        late = [number for number in range(24) if draw.random() < number / 24]
        calibration.learn(0, np.array(late, np.int64))
    assert experts[0] > 18


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1.0, 0.0, -0.5])
def test_a_score_that_is_no_probability_harms_nobody(score: float) -> None:
    calibration = Calibration()
    for _ in range(3):
        experts, worth = calibration.note(Prediction.of(0, 1, (Guess(1, score), Guess(2, 0.4))))
        calibration.learn(0, np.array([1, 2]))
        assert sorted(experts.tolist()) == [1, 2]
        assert len(worth) == 2
    assert worth_of(calibration, Prediction.of(0, 1, (Guess(2, 0.4),)))[2] > 0.4
