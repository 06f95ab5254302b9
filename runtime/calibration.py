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
        self._true: dict[int, list[float]] = {}
        self._seen: dict[int, list[float]] = {}
        self._open: dict[int, list[tuple[int, list[tuple[int, int]]]]] = {}

    def note(self, prediction: Prediction) -> dict[int, float]:
        """Return expert -> the frequency its guess is worth, and remember to check it."""
        distance = prediction.distance
        if distance not in self._seen:
            self._true[distance], self._seen[distance] = [0.0] * BINS, [0.0] * BINS
        true, seen = self._true[distance], self._seen[distance]
        worth: dict[int, float] = {}
        noted: list[tuple[int, int]] = []
        for expert, score in prediction.guesses:
            cell = min(BINS - 1, int(score * BINS))
            noted.append((expert, cell))
            worth[expert] = (PRIOR_WEIGHT * score + true[cell]) / (PRIOR_WEIGHT + seen[cell])
        self._open.setdefault(prediction.layer, []).append((distance, noted))
        return worth

    def learn(self, layer: int, chosen: Set[int]) -> None:
        """Check the guesses for `layer` against what its router chose."""
        for distance, noted in self._open.pop(layer, ()):
            true, seen = self._true[distance], self._seen[distance]
            for expert, cell in noted:
                if seen[cell] >= FORGET_AT:
                    seen[cell], true[cell] = seen[cell] / 2, true[cell] / 2
                seen[cell] += 1.0
                if expert in chosen:
                    true[cell] += 1.0
