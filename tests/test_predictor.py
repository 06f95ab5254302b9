"""The predictor: what it guesses without training, what it learns, and when it trusts which."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from runtime import predictor_files
from runtime.predictor import MAX_TOKENS, Predictor
from runtime.predictor_open import LearningPredictor
from runtime.predictor_ranking import Curve, margins
from runtime.predictor_reuse import folded, folded_from_residual, unit_rms
from tests.predictors import guesses, heads_that_reuse, learner, many, recalls, ship
from tests.routing_streams import EXPERTS, HIDDEN, LAYERS, TOP_K, Token, embedding, stream, views

# Without training


def test_a_cold_start_guesses_what_the_folded_routers_choose() -> None:
    routers, token = views(), many(3, 1)[0]
    made = {
        (m.layer, m.distance): m
        for m in guesses(Predictor(routers, embedding(), torch.float32), token)
    }
    wanted = {(place + d - 1, d) for place in range(LAYERS) for d in (1, 2)}
    assert set(made) == {(layer, d) for layer, d in wanted if layer < LAYERS}
    for (layer, distance), prediction in made.items():
        place = layer + 1 - distance
        if place:
            x = token.inputs[place - 1]
            scores = (x @ folded(routers[place - 1], routers[layer]).T)[0]
        else:
            scores = (unit_rms(embedding()[token.ids]) @ folded_from_residual(routers[layer]).T)[0]
        best = scores.topk(2 * TOP_K).indices.tolist()
        assert [guess.expert for guess in prediction.guesses] == best
        chances = [guess.probability for guess in prediction.guesses]
        assert chances == sorted(chances, reverse=True)
        assert all(0.0 <= chance <= 1.0 for chance in chances)


def test_without_noise_or_shift_reuse_is_always_right() -> None:
    predictor = Predictor(views(), embedding(), torch.float32)
    tokens = list(islice(stream(4, noise=0.0), 20))
    assert recalls(predictor, tokens) == {1: 1.0, 2: 1.0}


def test_a_layer_that_was_not_understood_is_neither_guessed_nor_guessed_from() -> None:
    routers = [*views()[:1], None, *views()[2:]]
    made = guesses(Predictor(routers, None, torch.float32), many(3, 1)[0])
    assert {(m.layer, m.distance) for m in made} == {(2, 2), (3, 1)}


def test_long_passes_are_not_guessed() -> None:
    predictor = Predictor(views(), embedding(), torch.float32)
    count = MAX_TOKENS + 1
    assert predictor.begin_pass(torch.zeros(count, dtype=torch.int64)).read() == ()
    token = many(3, 1)[0]
    rows = [t.expand(count, -1) for t in (token.inputs[0], token.chosen[0], token.weights[0])]
    assert predictor.launch(0, *rows).read() == ()


def test_rows_are_merged_into_the_chance_that_any_token_needs_an_expert() -> None:
    routers = views()
    predictor = Predictor(routers, embedding(), torch.float32)
    tokens = many(5, 3)
    ids = torch.cat([token.ids for token in tokens])
    predictor.begin_pass(ids)
    parts = [
        [getattr(token, name)[0] for token in tokens] for name in ("inputs", "chosen", "weights")
    ]
    made = predictor.launch(0, *(torch.cat(part) for part in parts)).read()
    curve = next(s.curve for s in predictor.slots if (s.layer, s.distance) == (1, 1))
    scores = torch.cat(parts[0]) @ folded(routers[0], routers[1]).T
    each = torch.sigmoid(margins(scores, TOP_K) * curve.slope + curve.offset)
    wanted = 1 - (1 - each).prod(0)
    (near,) = (m for m in made if m.distance == 1)
    assert len(near.guesses) <= min(EXPERTS, 2 * TOP_K * 3)
    for guess in near.guesses:
        assert guess.probability == pytest.approx(float(wanted[guess.expert]), abs=1e-5)
    kept = {guess.expert for guess in near.guesses}
    assert kept == {e for e in range(EXPERTS) if wanted[e] > 0.02}


def test_half_precision_models_are_guessed_too() -> None:
    predictor = Predictor(views(), embedding().bfloat16(), torch.bfloat16)
    tokens = [
        Token(t.ids, [x.bfloat16() for x in t.inputs], t.chosen, t.weights)
        for t in islice(stream(4, noise=0.0), 20)
    ]
    assert min(recalls(predictor, tokens).values()) > 0.9


def test_a_curve_is_flat_far_away_and_rises() -> None:
    curve = Curve(2.0, -1.0)
    assert curve.at(-1e9) == pytest.approx(0.0)
    assert curve.at(1e9) == pytest.approx(1.0)
    assert curve.at(0.5) == pytest.approx(0.5)


# Learned heads, and when they are used


def test_good_heads_with_figures_are_used_from_the_start(tmp_path: Path) -> None:
    shipped = ship(tmp_path, heads_that_reuse(), reuse=0.5, learned=0.9)
    predictor = learner(shipped=shipped)
    assert predictor.notices == ()
    assert all(slot.shadow.learned_on for slot in predictor.slots)
    tokens = list(islice(stream(4, noise=0.0), 20))
    assert min(recalls(predictor, tokens).values()) > 0.97


def test_a_bad_head_with_honest_figures_is_never_used(tmp_path: Path) -> None:
    shipped = ship(tmp_path, heads_that_reuse(0.0, noise=1.0), reuse=0.8, learned=0.3)
    predictor = learner(shipped=shipped)
    plain = Predictor(views(), embedding(), torch.float32)
    tokens = many(6, 100)
    for token in tokens:
        assert guesses(predictor, token) == guesses(plain, token) or not any(
            slot.shadow.learned_on for slot in predictor.slots
        )
    predictor.improve(60.0)
    assert not any(slot.shadow.learned_on for slot in predictor.slots)


def test_a_bad_head_that_claims_to_be_good_is_switched_off_by_live_tokens(tmp_path: Path) -> None:
    shipped = ship(tmp_path, heads_that_reuse(0.0, noise=1.0), reuse=0.2, learned=0.9)
    predictor = learner(shipped=shipped)
    assert all(slot.shadow.learned_on for slot in predictor.slots)
    tokens = many(6, 300)
    before = recalls(predictor, tokens)
    predictor.improve(60.0)
    assert not any(slot.shadow.learned_on for slot in predictor.slots)
    after = recalls(predictor, many(7, 100))
    assert after[1] > before[1] + 0.2


def test_a_head_without_evidence_waits_for_live_tokens(tmp_path: Path) -> None:
    """The shadow knows what the head would have guessed although it was never used."""
    lean = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(8)) * 4
    shipped = ship(tmp_path, heads_that_reuse(lean=lean), reuse=0.0, learned=0.0)
    facts = json.loads((shipped / "predictor.json").read_text()) | {"slots": []}
    predictor_files.write(shipped, "predictor", heads_that_reuse(lean=lean).tensors(), facts)
    predictor = learner(shipped=shipped)
    assert predictor.heads is not None
    assert not any(slot.shadow.learned_on for slot in predictor.slots)
    for token in many(6, 20, bias=lean):
        guesses(predictor, token)
    predictor.improve(60.0)
    assert not any(slot.shadow.learned_on for slot in predictor.slots)  # too few yet
    for token in many(7, 200, bias=lean):
        guesses(predictor, token)
    predictor.improve(60.0)
    assert all(slot.shadow.learned_on for slot in predictor.slots)


def test_some_slots_learned_and_others_reused_give_each_its_own_guesses(tmp_path: Path) -> None:
    shipped = ship(tmp_path, heads_that_reuse(scale=-1.0), reuse=0.5, learned=0.9)
    predictor = learner(shipped=shipped)
    for slot in predictor.slots:
        slot.shadow.learned_on = slot.distance == 2
    predictor.rebuild()
    plain = Predictor(views(), embedding(), torch.float32)
    token = list(islice(stream(4, noise=0.0), 1))[0]
    mixed = {(m.layer, m.distance): m for m in guesses(predictor, token)}
    for made in guesses(plain, token):
        mine = {g.expert for g in mixed[made.layer, made.distance].guesses[:TOP_K]}
        reused = {g.expert for g in made.guesses[:TOP_K]}
        assert (mine == reused) == (made.distance == 1)


# Learning from live tokens


def test_the_online_form_learns_a_shifted_world() -> None:
    generator = torch.Generator().manual_seed(8)
    bias = torch.randn(EXPERTS, generator=generator) * 4
    left, right = (torch.randn(HIDDEN, 2, generator=generator) for _ in range(2))
    shift = left @ right.T / HIDDEN * 1.5
    predictor, plain = learner(), Predictor(views(), embedding(), torch.float32)
    fresh = many(100, 150, shift=shift, bias=bias)
    before = recalls(plain, fresh)
    for answer in range(8):
        for token in many(200 + answer, 120, shift=shift, bias=bias):
            guesses(predictor, token)
        predictor.improve(20.0)
    after = recalls(predictor, fresh)
    assert after[1] > before[1] + 0.05
    assert after[2] > before[2] + 0.05
    assert predictor.weight_bytes <= plain.weight_bytes * 1.1  # it is folded, not added


def test_in_a_world_that_is_as_it_was_nothing_gets_worse() -> None:
    predictor, plain = learner(), Predictor(views(), embedding(), torch.float32)
    for answer in range(6):
        for token in many(300 + answer, 80):
            guesses(predictor, token)
        predictor.improve(60.0)
    fresh = many(310, 300)
    before, after = recalls(plain, fresh), recalls(predictor, fresh)
    assert all(after[d] > before[d] - 0.005 for d in (1, 2))


def test_what_fits_one_answer_only_is_never_used() -> None:
    """Every answer leans another way: nothing learned in one may be used in the next."""
    generator = torch.Generator().manual_seed(8)
    predictor = learner()
    for answer in range(8):
        bias = torch.randn(EXPERTS, generator=generator) * 3
        for token in many(400 + answer, 80, bias=bias):
            guesses(predictor, token)
        predictor.improve(60.0)
    plain, fresh = Predictor(views(), embedding(), torch.float32), many(500, 200)
    before, after = recalls(plain, fresh), recalls(predictor, fresh)
    assert all(after[d] > before[d] - 0.02 for d in (1, 2))


def test_probabilities_become_true_shares() -> None:
    predictor = learner()
    for token in many(400, 400):
        guesses(predictor, token)
    predictor.improve(60.0)
    told, true, count = 0.0, 0, 0
    for token in many(401, 200):
        for made in guesses(predictor, token):
            wanted = set(token.chosen[made.layer][0].tolist())
            for guess in made.guesses:
                told, count = told + guess.probability, count + 1
                true += guess.expert in wanted
    assert told / count == pytest.approx(true / count, abs=0.03)


def test_nothing_is_learned_from_passes_of_many_tokens_or_from_nothing() -> None:
    predictor = learner()
    predictor.improve(1.0)
    tokens = many(5, 2)
    predictor.begin_pass(torch.cat([token.ids for token in tokens]))
    for layer in range(LAYERS):
        rows = [
            torch.cat([getattr(t, n)[layer] for t in tokens])
            for n in ("inputs", "chosen", "weights")
        ]
        predictor.launch(layer, *rows)
    predictor.begin_pass(tokens[0].ids)
    assert len(predictor.memory) == 0


def test_learning_goes_on_where_a_short_pause_ended_it() -> None:
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(8)) * 4
    whole, sliced = learner(), learner()
    for answer in range(3):
        for token in many(200 + answer, 100, bias=bias):
            guesses(whole, token)
            guesses(sliced, token)
        whole.improve(60.0)
        for _ in range(len(sliced.slots) + 1):
            sliced.improve(0.0)
    token = many(9, 1)[0]
    assert guesses(sliced, token) == guesses(whole, token)
    assert guesses(sliced, token) != guesses(learner(), token)


def test_tokens_that_come_between_two_pauses_do_no_harm() -> None:
    predictor = learner()
    for number, token in enumerate(many(200, 300)):
        guesses(predictor, token)
        if number % 10 == 9:
            predictor.improve(0.0)
    predictor.improve(60.0)
    seen = [slot.shadow.reuse.tokens for slot in predictor.slots]
    assert min(seen) > 200
    assert max(seen) <= 300


def test_inference_mode_around_some_calls_only_is_as_good_as_around_all(tmp_path: Path) -> None:
    """The engine begins a pass outside of it, runs layers inside, and learns outside."""
    shipped = ship(tmp_path, heads_that_reuse(), reuse=0.5, learned=0.6)
    table = embedding().requires_grad_()
    predictor = LearningPredictor(views(), table, torch.float32, shipped, None)
    other = LearningPredictor(views(), table, torch.float32, shipped, None)
    predictor.slots[0].shadow.learned_on = other.slots[0].shadow.learned_on = False
    for one in (predictor, other):
        one.rebuild()
    for number, token in enumerate(many(6, 80)):
        made = list(predictor.begin_pass(token.ids).read())
        with torch.inference_mode():
            for layer in range(LAYERS):
                rows = (token.inputs[layer], token.chosen[layer], token.weights[layer])
                pending = predictor.launch(layer, *(row.clone() for row in rows))
                made += pending.read()
        assert made == guesses(other, token)
        if number == 70:
            predictor.improve(60.0)
            other.improve(60.0)


def test_figures_tell_what_is_in_use_and_how_well_it_does(tmp_path: Path) -> None:
    shipped = ship(tmp_path, heads_that_reuse(0.0, noise=1.0), reuse=0.2, learned=0.9)
    predictor = learner(shipped=shipped)
    assert all(one.learned_on and one.recall_at_k == 0.9 for one in predictor.figures())
    for token in many(6, 300):
        guesses(predictor, token)
    predictor.improve(60.0)
    for one in predictor.figures():
        assert not one.learned_on
        assert one.recall_at_k == one.reuse_recall_at_k
    assert predictor.seconds > 0.0
