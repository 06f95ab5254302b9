"""The panel's map of uses against its definition, one use at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtime.core import ExpertId
from runtime.executor_heat import HALF_LIFE_TOKENS, HEAT_MAX, HEAT_PER_USE, RESIDENT_BIT, Heat

LAYERS, EXPERTS = 3, 5


@pytest.mark.parametrize("seed", range(5))
def test_every_use_counts_and_fades_by_half_in_sixteen_tokens(seed: int) -> None:
    draw, heat, now = random.Random(seed), Heat((EXPERTS,) * LAYERS), 0.0
    uses: list[tuple[ExpertId, float]] = []
    for _ in range(60):
        now += draw.choice((0.0, 1.0, 7.0))
        layer = draw.randrange(LAYERS)
        chosen = draw.sample(range(EXPERTS), 2)
        heat.use(layer, np.array(chosen), now)
        uses += [(ExpertId(layer, expert), now) for expert in chosen]
    now += 3.0
    resident = {ExpertId(0, 1), ExpertId(2, 4)}
    picture = heat.picture(resident, now)
    assert len(picture) == LAYERS * EXPERTS
    for place, byte in enumerate(picture):
        expert = ExpertId(*divmod(place, EXPERTS))
        score = sum(0.5 ** ((now - at) / HALF_LIFE_TOKENS) for e, at in uses if e == expert)
        assert bool(byte & RESIDENT_BIT) == (expert in resident)
        assert abs((byte & ~RESIDENT_BIT) - min(HEAT_MAX, score * HEAT_PER_USE)) <= 1.0
    assert len(set(picture)) > 4
