"""What a predictor learned outlives a restart; what does not fit is ignored with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from runtime import predictor_files
from runtime.predictor import Predictor
from runtime.predictor_open import LearningPredictor
from tests.predictors import guesses, heads_that_reuse, learner, many, ship
from tests.routing_streams import EXPERTS, embedding, views


def learned_in(folder: Path) -> LearningPredictor:
    """A predictor that has learned something and kept it in `folder`."""
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(8)) * 4
    predictor = learner(folder)
    for answer in range(3):
        for token in many(200 + answer, 100, bias=bias):
            guesses(predictor, token)
        predictor.improve(60.0)
    assert any(slot.correction is not None for slot in predictor.slots)
    return predictor


def test_what_was_learned_is_there_after_a_restart_and_gone_after_a_reset(tmp_path: Path) -> None:
    predictor, token = learned_in(tmp_path), many(9, 1)[0]
    again = learner(tmp_path)
    assert again.notices == ()
    assert guesses(again, token) == guesses(predictor, token)
    fresh = Predictor(views(), embedding(), torch.float32)
    assert guesses(again, token) != guesses(fresh, token)
    again.reset()
    assert list(tmp_path.iterdir()) == []
    assert guesses(again, token) == guesses(fresh, token)


def only(folder: Path, suffix: str) -> Path:
    (found,) = folder.glob(f"*{suffix}")
    return found


def test_damaged_foreign_and_future_files_are_ignored_with_a_reason(tmp_path: Path) -> None:
    learned_in(tmp_path)
    weights, facts = only(tmp_path, ".safetensors"), only(tmp_path, ".json")
    raw, text = weights.read_bytes(), facts.read_text()
    damages = {
        "weights cut": lambda: weights.write_bytes(raw[:-7]),
        "weights changed": lambda: weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])),
        "weights gone": lambda: weights.unlink(),
        "json cut": lambda: facts.write_text(text[:40]),
        "json not an object": lambda: facts.write_text("[]"),
        "json binary": lambda: facts.write_bytes(b"\xff\xfe\x00"),
        "format": lambda: facts.write_text(text.replace('"format": 1', '"format": 99')),
        "slots gone": lambda: facts.write_text(text.replace('"slots"', '"slits"')),
        "other model": lambda: facts.write_text(
            text.replace(predictor_files.fingerprint(views()), "0" * 32)
        ),
    }
    token = many(9, 1)[0]
    wanted = guesses(Predictor(views(), embedding(), torch.float32), token)
    for name, damage in damages.items():
        weights.write_bytes(raw)
        facts.write_text(text)
        damage()
        predictor = learner(tmp_path)
        assert len(predictor.notices) == 1, name
        assert "ignored" in predictor.notices[0], name
        assert guesses(predictor, token) == wanted, name


def test_shapes_that_do_not_fit_are_ignored_even_if_the_hash_is_right(tmp_path: Path) -> None:
    learned_in(tmp_path)
    facts = json.loads(only(tmp_path, ".json").read_text())
    name = only(tmp_path, ".json").stem
    predictor_files.write(tmp_path, name, {"1.1.bias": torch.zeros(3)}, facts)
    predictor = learner(tmp_path)
    assert "has the shape (3,)" in predictor.notices[0]
    heads = heads_that_reuse()
    shipped = ship(tmp_path / "shipped", heads, reuse=0.5, learned=0.9)
    facts = json.loads((shipped / "predictor.json").read_text())
    for key, bad, reason in (
        ("past", heads.tables.past[:, :5], "5 experts"),
        ("2.first", torch.zeros(3, 3, dtype=torch.int8), "2.first has the shape (3, 3)"),
        ("bias", heads.tables.bias * float("nan"), "not finite"),
    ):
        tensors = heads.tensors() | {key: bad}
        predictor_files.write(shipped, "predictor", tensors, facts)
        predictor = learner(shipped=shipped)
        assert predictor.heads is None, key
        assert len(predictor.notices) == 1, key
        assert reason in predictor.notices[0]
    few = heads.tensors() | {
        "token": heads.tables.token[:-1],
        "previous": heads.tables.previous[:-1],
    }
    predictor_files.write(shipped, "predictor", few, facts)
    assert "tokens" in learner(shipped=shipped).notices[0]
    incomplete = {k: t for k, t in heads.tensors().items() if k != "1.second"}
    predictor_files.write(shipped, "predictor", incomplete, facts)
    assert len(learner(shipped=shipped).notices) == 1


def test_another_models_learning_is_not_touched(tmp_path: Path) -> None:
    learned_in(tmp_path)
    other = learner(tmp_path, seed=5)
    assert other.notices == ()
    other.reset()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_told_and_survived(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    predictor = learner(blocked / "inside")
    for token in many(200, 80):
        guesses(predictor, token)
    predictor.improve(60.0)
    assert "could not be kept" in predictor.notices[0]


def test_a_fingerprint_is_the_same_for_any_dtype_and_differs_between_models() -> None:
    half = [
        type(v)(v.top_k, v.weight.bfloat16(), v.bias, v.gain.bfloat16().float()) for v in views()
    ]
    same = [type(v)(v.top_k, v.weight.float(), v.bias, v.gain) for v in half]
    assert predictor_files.fingerprint(half) == predictor_files.fingerprint(same)
    assert predictor_files.fingerprint(views()) != predictor_files.fingerprint(views(5))
