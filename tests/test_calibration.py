"""A guess is worth what such guesses were worth before."""

from __future__ import annotations

import random

import pytest

from runtime.calibration import Calibration
from runtime.trace import Guess, Prediction


def test_before_anything_was_seen_a_score_counts_for_what_it_says() -> None:
    worth = Calibration().note(Prediction(3, 1, (Guess(7, 0.8), Guess(2, 0.1))))
    assert worth == {7: pytest.approx(0.8), 2: pytest.approx(0.1)}


def test_a_boaster_is_believed_less_and_a_modest_one_more() -> None:
    draw = random.Random(1)
    calibration = Calibration()
    for _ in range(300):
        calibration.note(Prediction(0, 1, (Guess(1, 0.95), Guess(2, 0.15))))
        chosen = {e for e, p in ((1, 0.4), (2, 0.6)) if draw.random() < p}
        calibration.learn(0, chosen)
    worth = calibration.note(Prediction(0, 1, (Guess(1, 0.95), Guess(2, 0.15))))
    assert worth[1] == pytest.approx(0.4, abs=0.08)
    assert worth[2] == pytest.approx(0.6, abs=0.08)


def test_distances_are_judged_apart() -> None:
    calibration = Calibration()
    for _ in range(200):
        calibration.note(Prediction(0, 1, (Guess(1, 0.5),)))
        calibration.note(Prediction(0, 2, (Guess(2, 0.5),)))
        calibration.learn(0, {1})
    near = calibration.note(Prediction(0, 1, (Guess(1, 0.5),)))
    far = calibration.note(Prediction(0, 2, (Guess(1, 0.5),)))
    assert near[1] > 0.9
    assert far[1] < 0.1


def test_it_follows_a_predictor_that_changes() -> None:
    calibration = Calibration()
    for came_true in (True, False):
        for _ in range(6000):
            calibration.note(Prediction(0, 1, (Guess(1, 0.5),)))
            calibration.learn(0, {1} if came_true else set())
    assert calibration.note(Prediction(0, 1, (Guess(1, 0.5),)))[1] < 0.25
