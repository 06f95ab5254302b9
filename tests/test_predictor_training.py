"""What is trained is what is served: the network, its packed form and the running predictor."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import torch

from assets.training.predictor_data import Routing
from assets.training.predictor_net import (
    Network,
    Sizes,
    layer_groups,
    packed_scores,
    past_of,
    rows_of,
)
from assets.training.predictor_publish import judged_slots, write
from assets.training.predictor_train import loss_of, train
from runtime.predictor_open import LearningPredictor
from tests.routing_streams import EXPERTS, LAYERS, TOP_K, VOCABULARY, embedding, stream, views

GROUPS = ["near input", "middle", "near output"]
SIZES = Sizes(compressed=10, inner=8, code=6, half_life_tokens=3.0)


def recorded(seed: int, chats: int, tokens: int) -> Routing:
    """Chats of the made-up model, its residual turned between layers as experts would."""
    generator = torch.Generator().manual_seed(77)
    shift = torch.randn(24, 24, generator=generator) * 0.25
    rows = []
    for chat in range(chats):
        rows += islice(stream(seed * 1000 + chat, shift=shift), tokens)
    starts = torch.zeros(len(rows), dtype=torch.bool)
    starts[::tokens] = True
    return Routing(
        torch.stack([torch.cat(row.inputs) for row in rows]).half(),
        torch.stack([torch.cat(row.chosen) for row in rows]),
        torch.stack([torch.cat(row.weights) for row in rows]).half(),
        torch.cat([row.ids for row in rows]),
        starts,
    )


def network_for(data: Routing) -> Network:
    torch.manual_seed(0)
    routers = torch.stack([view.weight for view in views()])
    gains = torch.stack([view.gain for view in views()])
    network = Network(data, routers, gains, VOCABULARY, GROUPS, SIZES)
    with torch.no_grad():  # nothing may be zero, or a part that is not served would not show
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def test_past_choices_fade_and_stop_where_a_chat_begins() -> None:
    data = recorded(1, chats=2, tokens=5)
    past = past_of(data, EXPERTS, half_life_tokens=2.0).float()
    fade = 0.5**0.5
    hot = torch.zeros(10, LAYERS, EXPERTS).scatter_(2, data.chosen, 1.0)
    assert torch.equal(past[0], torch.zeros(LAYERS, EXPERTS))
    assert torch.equal(past[5], torch.zeros(LAYERS, EXPERTS))
    torch.testing.assert_close(past[2], hot[1] + hot[0] * fade, atol=2e-3, rtol=0)


def test_packing_changes_scores_by_little() -> None:
    data = recorded(1, chats=2, tokens=60)
    network, rows = network_for(data), rows_of(data, EXPERTS, SIZES.half_life_tokens)
    with torch.no_grad():
        exact = network(rows, forgetting=False)
    for place, (want, got) in enumerate(
        zip(exact, packed_scores(network.heads(TOP_K), rows), strict=True)
    ):
        assert got.shape == want.shape == (120, min(2, LAYERS - place), EXPERTS)
        assert float((got - want).abs().mean()) < 0.02 * float(want.std()) + 1e-3


def test_the_running_predictor_scores_each_token_as_training_did(tmp_path: Path) -> None:
    """Token by token, with its own memory, it sees what a row of the recording holds."""
    data = recorded(2, chats=1, tokens=40)
    network, rows = network_for(data), rows_of(data, EXPERTS, SIZES.half_life_tokens)
    write(tmp_path, network, views(), embedding(), rows, rows, {})
    predictor = LearningPredictor(views(), embedding(), torch.float32, tmp_path, None)
    assert predictor.heads is not None
    for slot in predictor.slots:
        slot.shadow.learned_on = True
    predictor.rebuild()
    wanted = packed_scores(predictor.heads, rows)
    different = 0
    for row in range(len(data)):
        made = list(predictor.begin_pass(data.tokens[row : row + 1]).read())
        for layer in range(LAYERS):
            one = slice(row, row + 1)
            made += predictor.launch(
                layer,
                data.inputs[one, layer].float(),
                data.chosen[one, layer],
                data.weights[one, layer],
            ).read()
        assert len(made) == 2 * LAYERS - 1
        for prediction in made:
            place = prediction.layer + 1 - prediction.distance
            scores = wanted[place][row, prediction.distance - 1]
            best = scores.topk(2 * TOP_K).indices.tolist()
            different += best != [guess.expert for guess in prediction.guesses]
    # Tables in half precision may swap two experts that are all but equal.
    assert different <= 0.03 * len(data) * (2 * LAYERS - 1)


def test_a_prompt_in_one_pass_leaves_the_same_memory_as_its_last_tokens_one_by_one(
    tmp_path: Path,
) -> None:
    data = recorded(3, chats=1, tokens=16)
    network, rows = network_for(data), rows_of(data, EXPERTS, SIZES.half_life_tokens)
    write(tmp_path, network, views(), embedding(), rows, rows, {})
    bases = []
    for passes in ([slice(0, 15)], [slice(n, n + 1) for n in range(15)]):
        predictor = LearningPredictor(views(), embedding(), torch.float32, tmp_path, None)
        for part in passes:
            predictor.begin_pass(data.tokens[part])
            for layer in range(LAYERS):
                predictor.launch(
                    layer,
                    data.inputs[part, layer].float(),
                    data.chosen[part, layer],
                    data.weights[part, layer],
                )
        assert predictor.past is not None
        bases.append(predictor.past.base(data.tokens[15:16]))
    torch.testing.assert_close(bases[0], bases[1], atol=1e-4, rtol=1e-4)


def test_learned_heads_beat_router_reuse_where_experts_move_the_residual() -> None:
    data, unseen = recorded(4, chats=40, tokens=60), recorded(5, chats=10, tokens=60)
    torch.manual_seed(0)
    routers = torch.stack([view.weight for view in views()])
    gains = torch.stack([view.gain for view in views()])
    network = Network(data, routers, gains, VOCABULARY, GROUPS, Sizes(20, 24, 16))
    rows = rows_of(data, EXPERTS, 4.0)
    train(network, rows, ["plain", "focal", "plain", "weighted"], epochs=12, rate=1e-2, batch=128)
    slots = judged_slots(network.heads(TOP_K), views(), embedding(), rows_of(unseen, EXPERTS, 4.0))
    gains_found = [s.shadow.learned.recall - s.shadow.reuse.recall for s in slots if s.place]
    assert min(gains_found) > 0.02
    assert all(slot.shadow.learned_on for slot in slots)


def test_every_loss_prefers_the_right_experts() -> None:
    chosen = torch.tensor([[[0, 1, 2]] * LAYERS] * 4)
    right = torch.full((4, 1, EXPERTS), -3.0)
    right[:, :, :3] = 3.0
    for kind in ("plain", "focal", "weighted", "focal weighted"):
        assert loss_of([right], chosen, [kind]) < 0.3 * loss_of([-right], chosen, [kind])


def test_groups_follow_what_was_measured_and_not_the_position() -> None:
    """Inputs are made alike between layers 1, 2 and 3 only, wherever that is."""
    rng = random.Random(0)
    rows, layers = 400, 7
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, layers, 16, generator=generator)
    chosen = torch.stack(
        [torch.tensor([rng.sample(range(EXPERTS), 3) for _ in range(layers)]) for _ in range(rows)]
    )
    weights = torch.full((rows, layers, 3), 0.9)
    for alike in (2, 3, 4):
        inputs[:, alike] = inputs[:, 1] + 0.1 * inputs[:, alike]
    weights[:, 1:4] = 0.34
    data = Routing(
        inputs, chosen, weights, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows).bool()
    )
    groups, figures = layer_groups(data, EXPERTS)
    assert groups == ["near input", "middle", "middle", "middle", "near output", "near output"]
    assert len(figures) == layers - 1
