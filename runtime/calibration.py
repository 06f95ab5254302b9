"""How often a predictor's guesses came true, by distance and score: what its score is worth.

A predictor's own probabilities are hopes; what is copied ahead is decided by what was seen.
"""

from __future__ import annotations

from collections.abc import Set

from runtime.trace import Prediction

BINS = 10
PRIOR_WEIGHT = 20.0
FORGET_AT = 2000.0


class Calibration:
    """Turns scores into frequencies, one bin per tenth of the score, kept by moving counts.

    Before anything was seen a score counts for what it says.
    """

    def __init__(self) -> None:
        self._true: dict[tuple[int, int], float] = {}
        self._seen: dict[tuple[int, int], float] = {}
        self._open: dict[int, list[tuple[int, int, int]]] = {}

    def note(self, prediction: Prediction) -> dict[int, float]:
        """Return expert -> the frequency its guess is worth, and remember to check it."""
        worth: dict[int, float] = {}
        noted = self._open.setdefault(prediction.layer, [])
        for expert, score in prediction.guesses:
            cell = (prediction.distance, min(BINS - 1, int(score * BINS)))
            noted.append((expert, *cell))
            seen = self._seen.get(cell, 0.0)
            hoped = PRIOR_WEIGHT * score
            worth[expert] = (hoped + self._true.get(cell, 0.0)) / (PRIOR_WEIGHT + seen)
        return worth

    def learn(self, layer: int, chosen: Set[int]) -> None:
        """Check the guesses for `layer` against what its router chose."""
        for expert, distance, score_bin in self._open.pop(layer, ()):
            cell = (distance, score_bin)
            seen = self._seen.get(cell, 0.0)
            if seen >= FORGET_AT:
                self._seen[cell] = seen / 2
                self._true[cell] = self._true.get(cell, 0.0) / 2
            self._seen[cell] = self._seen.get(cell, 0.0) + 1.0
            if expert in chosen:
                self._true[cell] = self._true.get(cell, 0.0) + 1.0
