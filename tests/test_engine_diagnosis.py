"""Invalid numbers end an answer at once, and the error names the layer where they began."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime.core import Delta, GenerationChunk, Message, SamplingParams
from runtime.errors import InvalidNumbersError
from tests.standin import engine, model

NAN, INF = float("nan"), float("inf")
QUESTION = [Message("user", "a longer text, all experts")]


def poked(change: Callable[[Any], Any], value: float) -> Any:
    """A copy of the model in which one number of the chosen tensor is `value`."""
    network = copy.deepcopy(model())
    with torch.no_grad():
        change(network).view(-1)[3] = value
    return network


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an expert": (lambda m: m.model.layers[1].mlp.experts.down_proj[5], "in layer 1 "),
    "attention": (lambda m: m.model.layers[2].self_attn.q_proj.weight, "in layer 2 "),
    "a router": (lambda m: m.model.layers[0].mlp.gate.weight, "in layer 0 "),
    "the embedding": (lambda m: m.model.embed_tokens.weight, "in what layer 0 "),
    "the head": (lambda m: m.lm_head.weight, "invalid numbers (its best score"),
}
HONEST = ("the head", INF)
SAMPLED = SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)
PENALISED = SamplingParams(max_new_tokens=8, repetition_penalty=1.2)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=8), SAMPLED, PENALISED])
@pytest.mark.parametrize(
    ("fault", "value"),
    # One infinite score among those of the head may be honest.
    [(fault, value) for fault in FAULTS for value in (NAN, INF) if (fault, value) != HONEST],
)
def test_the_layer_is_named_and_nothing_of_the_answer_comes(
    fault: str, value: float, params: SamplingParams
) -> None:
    change, named = FAULTS[fault]
    network = poked(change, value)
    if fault == "the embedding":  # whatever the token
        network.model.embed_tokens.weight.data[:, 0] = value
    one = engine(network=network)
    chunks: list[GenerationChunk] = []
    with pytest.raises(InvalidNumbersError) as failed:
        chunks.extend(one.generate("c", QUESTION, params))
    assert named in failed.value.message
    assert "damaged" in failed.value.next_step
    assert not any(isinstance(chunk, Delta) for chunk in chunks)
    assert one.kept_tokens == 0  # keys and values with NaN in them must not be used again


def test_others_get_their_answers_and_so_does_the_next_request() -> None:
    """A conversation that turns bad leaves no trace: its model is mended and asked again."""
    network = poked(FAULTS["an expert"][0], NAN)
    one, sound = engine(network=network), engine()
    params = SamplingParams(max_new_tokens=6)
    with pytest.raises(InvalidNumbersError):
        list(one.generate("c", QUESTION, params))
    assert not network.model.layers[1]._forward_hooks  # whoever watched is gone
    network.load_state_dict(model().state_dict())
    answers = [
        [
            i
            for chunk in e.generate("c", QUESTION, params)
            if isinstance(chunk, Delta)
            for i in chunk.token_ids
        ]
        for e in (one, sound)
    ]
    assert answers[0] == answers[1]
    assert answers[0]
