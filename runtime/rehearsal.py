"""A rehearsal before the first token: what decides is run once, so that it is compiled by then.

Nothing of it is kept. Compiling takes seconds after an update, and a moment where it is kept from
the last start; in the middle of an answer either would be a hiccup.
"""

from __future__ import annotations

from runtime.core import HardwareProfile
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.scheduler import Costs
from runtime.simulate import simulate
from runtime.trace import ForwardPass, Guess, LayerStep, Prediction

LAYERS, EXPERTS, SLOTS, TOP_K = 3, 8, 9, 3
EXPERT_BYTES = 1 << 20
PASSES = 24


def rehearse(profile: HardwareProfile) -> None:
    """Serve a few passes of a tiny model that does not exist on the modelled machine.

    `prescope` does so, which decides by all that is compiled; the others use some of it.
    """
    setup = PolicySetup(
        (EXPERTS,) * LAYERS, TOP_K, (EXPERT_BYTES,) * LAYERS, SLOTS, Costs.of(profile)
    )
    chunk_bytes = EXPERT_BYTES // 2
    passes = [_pass(number) for number in range(PASSES)]
    simulate(passes, profile, make_policy("prescope", setup), SLOTS, setup.layer_bytes, chunk_bytes)


def _pass(number: int) -> ForwardPass:
    """Every sixth pass is a prompt's; guesses are right for the most part."""
    span = 16 if number % 6 == 0 else 1
    steps = []
    for layer in range(LAYERS):
        chosen = _chosen(number, layer)
        recency = dict.fromkeys(chosen, 0.7) if span > 1 else None
        made = [(layer + distance, distance) for distance in (1, 2) if layer + distance < LAYERS]
        predictions = tuple(_guessed(number, target, distance) for target, distance in made)
        steps.append(LayerStep(dict.fromkeys(chosen, span), predictions, recency))
    return ForwardPass(span, tuple(steps), (_guessed(number, 0, 1),), span)


def _chosen(number: int, layer: int) -> list[int]:
    """Two experts that stay for a while and one that changes."""
    lasting = number // 5 + layer
    return sorted({lasting % EXPERTS, (lasting + 3) % EXPERTS, number * (layer + 2) % EXPERTS})


def _guessed(number: int, layer: int, distance: int) -> Prediction:
    likely = [*_chosen(number, layer), (number + 1) % EXPERTS]
    guesses = [Guess(expert, 0.9 / rank) for rank, expert in enumerate(dict.fromkeys(likely), 1)]
    return Prediction.of(layer, distance, guesses)
