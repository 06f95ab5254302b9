"""How often a predictor's guesses came true, by distance and score: what its score is worth.

A predictor's own probabilities are hopes; what is copied ahead is decided by what was seen.
"""

from __future__ import annotations

import numpy as np

from runtime.compiled import compiled
from runtime.trace import Experts, Prediction, Scores

BINS = 10
PRIOR_WEIGHT = 20.0
FORGET_AT = 2000.0


class Calibration:
    """Turns scores into frequencies, one bin per tenth of the score, kept by moving counts.

    Before anything was seen a score counts for what it says.
    """

    def __init__(self) -> None:
        self._bins: dict[int, Scores] = {}  # by distance (2, BINS): came true, seen
        self._open: dict[int, list[Prediction]] = {}

    def note(self, prediction: Prediction) -> tuple[Experts, Scores]:
        """Return who is guessed and the frequencies that these guesses are worth, the highest
        first, and remember to check them."""
        bins = self._bins.get(prediction.distance)
        if bins is None:
            bins = self._bins[prediction.distance] = np.zeros((2, BINS))
        self._open.setdefault(prediction.layer, []).append(prediction)
        experts, worth = prediction.experts, np.empty_like(prediction.scores)
        if not _judge(prediction.scores, bins, worth):
            order = np.argsort(-worth, kind="stable")
            experts, worth = experts[order], worth[order]
        return experts, worth

    def learn(self, layer: int, chosen: Experts) -> None:
        """Check the guesses for `layer` against what its router chose."""
        for prediction in self._open.pop(layer, ()):
            bins = self._bins[prediction.distance]
            _learn(prediction.experts, prediction.scores, chosen, bins)


@compiled
def _bin(score: float) -> int:
    if score >= 1.0:
        return BINS - 1
    return int(score * BINS) if score > 0.0 else 0  # nor is "not a number" above 0


@compiled
def _judge(scores: Scores, bins: Scores, worth: Scores) -> bool:
    """Write the scores' frequencies into `worth`; say whether they fall, as a predictor's do."""
    falling = True
    for number in range(len(scores)):
        cell = _bin(scores[number])
        worth[number] = (PRIOR_WEIGHT * scores[number] + bins[0, cell]) / (
            PRIOR_WEIGHT + bins[1, cell]
        )
        if number and worth[number] > worth[number - 1]:
            falling = False
    return falling


@compiled
def _learn(experts: Experts, scores: Scores, chosen: Experts, bins: Scores) -> None:
    true, seen = bins[0], bins[1]
    for number in range(len(experts)):
        cell = _bin(scores[number])
        if seen[cell] >= FORGET_AT:
            seen[cell], true[cell] = seen[cell] / 2, true[cell] / 2
        seen[cell] += 1.0
        for each in chosen:
            if each == experts[number]:
                true[cell] += 1.0
                break
