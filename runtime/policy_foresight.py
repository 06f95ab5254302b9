"""Who the next layers are foreseen to use, for what their guesses were worth before.

What is foreseen is worked out when somebody asks: for most layers nobody does. The eviction rule is
told whom to spare. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.calibration import Calibration
from runtime.core import ExpertId
from runtime.eviction import Eviction
from runtime.policy import PolicySetup, Routed
from runtime.trace import Experts, Prediction, Scores

NOBODY: tuple[Experts, Scores] = (np.empty(0, np.int64), np.empty(0))


class Foresight:
    """Guesses for layers to come, each until its layer is done.

    Residents that are foreseen with at least the probability `spared_from` are spared.
    """

    def __init__(self, eviction: Eviction, setup: PolicySetup, spared_from: float) -> None:
        self._eviction = eviction
        self._setup = setup
        self._spared_from = spared_from
        self._calibration = Calibration()
        self._guesses: dict[int, Prediction] = {}
        self._soon: dict[int, tuple[Experts, Scores]] = {}
        self._spared: dict[int, Sequence[int]] = {}

    def begin_pass(self) -> None:
        """Expect nobody any more."""
        for layer in list(self._soon):
            self._forget(layer)
        self._guesses.clear()

    def foresee(self, predictions: Sequence[Prediction], farthest: int) -> None:
        """Hear guesses; those made more than `farthest` layers ahead are not taken."""
        for prediction in predictions:
            if prediction.distance <= farthest and prediction.layer < self._setup.layers:
                self._guesses[prediction.layer] = prediction
                self._forget(prediction.layer)

    def expected(self, layer: int) -> tuple[Experts, Scores]:
        """Return whom a layer to come will use and how likely, the likeliest first."""
        soon = self._soon.get(layer)
        if soon is None:
            prediction = self._guesses.get(layer)
            if prediction is None:
                return NOBODY
            soon = self._soon[layer] = experts, use = self._calibration.note(prediction)
            spared = experts[: int((use >= self._spared_from).sum())]
            if len(spared):
                self._spared[layer] = spared.tolist()
                self._eviction.spare(layer, spared)
        return soon

    def spares(self, expert: ExpertId) -> bool:
        """Say whether an expert is likely enough to be kept for."""
        self.expected(expert.layer)
        return expert.expert in self._spared.get(expert.layer, ())

    def done(self, routed: Routed) -> None:
        """A layer is done: hold against it what was guessed."""
        self._forget(routed.layer)
        self._guesses.pop(routed.layer, None)
        self._calibration.learn(routed.layer, routed.chosen)

    def everyone(self, layer: int, tokens: int) -> tuple[Prediction, ...]:
        """Return guesses for a prompt's chunk, which needs nearly every expert."""
        if layer >= self._setup.layers:
            return ()
        count = self._setup.experts[layer]
        use = 1.0 - (1.0 - self._setup.top_k / count) ** tokens
        return (Prediction(layer, 1, np.arange(count), np.full(count, use)),)

    def _forget(self, layer: int) -> None:
        if self._soon.pop(layer, None) is not None and self._spared.pop(layer, ()):
            self._eviction.spare(layer, ())
