"""How hot each expert is, for the panel's map: one byte per (layer, expert)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from runtime.core import ExpertId
from runtime.trace import Experts

HEAT_MAX = 127
RESIDENT_BIT = 0x80
HEAT_PER_USE = 24
HALF_LIFE_TOKENS = 16.0


class Heat:
    """Uses of experts, decayed by half in 16 tokens, whatever the policy goes by.

    `experts` is how many each layer has.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        layers, most = len(experts), max(experts)
        self._uses = np.zeros((layers, most))  # as they were at the layer's last turn
        self._turns = np.zeros(layers)

    def use(self, layer: int, experts: Experts, token: float) -> None:
        """Note that a layer used these experts at `token`, which never goes back."""
        uses = self._uses[layer]
        uses *= 0.5 ** ((token - self._turns[layer]) / HALF_LIFE_TOKENS)
        uses[experts] += 1.0
        self._turns[layer] = token

    def picture(self, resident: Iterable[ExpertId], token: float) -> bytes:
        """Return one byte per (layer, expert): bit 7 in a slot, the rest how hot, 0 to 127."""
        decayed = self._uses * 0.5 ** ((token - self._turns) / HALF_LIFE_TOKENS)[:, None]
        picture = np.minimum(decayed * HEAT_PER_USE, HEAT_MAX).astype(np.uint8)
        for layer, expert in resident:
            picture[layer, expert] |= RESIDENT_BIT
        return picture.tobytes()
