"""The switch of prediction: what is said in each state, and that engines do as was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import prediction
from app.pace import Pair, Progress
from app.prediction import PredictionWatch, prediction_view
from app.settings import SettingsStore
from runtime.core import EngineStatus
from tests.fake_engine import FakeEngine
from tests.test_panel import RUNNING

NOW = replace(RUNNING, policy="prescope", prediction=True, predictor_recall=0.7)
READY = EngineStatus(state="ready", model="m")


@pytest.mark.parametrize(
    ("on", "changes", "state", "words"),
    [
        (True, {"verdict": "It pays."}, "working", "It pays."),
        (True, {}, "working", "No verdict yet"),
        (True, {"predictor_recall": None}, "waiting", "first answer"),
        (
            True,
            {"predictor_recall": None, "prefetch_bytes_per_token": (0.0, 0.0, 1.0)},
            "working",
            "No verdict yet",
        ),
        (True, {"prediction": False, "verdict": "It cost 4 %."}, "paused", "It cost 4 %."),
        (True, {"prediction": False}, "paused", "Nothing is copied ahead"),
        (False, {"prediction": False, "verdict": "It pays."}, "off", "Prediction is off"),
        (False, {}, "off", "Prediction is off"),
        (True, {"policy": "hybrid"}, "never", "The policy Hybrid copies nothing ahead. PreScope"),
        (True, {"policy": "cpu-only"}, "never", "nothing to copy ahead"),
        (True, {"policy": "moe-infinity"}, "working", "No verdict yet"),
    ],
)
def test_every_state_has_its_sentence(
    on: bool, changes: dict[str, Any], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "POLICIES", ("prescope", "hybrid"))
    view = prediction_view(on, replace(NOW, **changes))
    assert (view.on, view.state) == (on, state)
    assert words in view.text
    assert view.text.endswith(".")


def test_a_policy_that_is_not_there_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "POLICIES", ("hybrid",))
    view = prediction_view(True, replace(NOW, policy="hybrid"))
    assert view.text == "The policy Hybrid copies nothing ahead."


def test_both_pairs_say_which_side_is_which() -> None:
    view = prediction_view(True, replace(NOW, trial_tokens_per_s=(40.0, 44.0)), Pair(False, 44, 40))
    assert view.trial is not None
    assert view.switched is not None
    assert (view.trial.text, view.trial.change) == ("40.0 → 44.0 tok/s", "+10 %")
    assert view.trial.label.endswith("off → on")
    assert (view.switched.text, view.switched.change) == ("44.0 → 40.0 tok/s", "−9 %")
    assert view.switched.label.endswith("on → off")
    off = prediction_view(False, NOW, Pair(False, 44, None))
    assert off.switched is not None
    assert off.switched.text == "44.0 → … tok/s"
    never = prediction_view(True, replace(NOW, policy="hybrid"), Pair(False, 44, 40))
    assert never.switched is None
    assert prediction_view(True, None).state == "none"


class Told(FakeEngine):
    """Remembers what it was told about prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def set_prediction(self, on: bool) -> None:
        self.told.append(on)
        super().set_prediction(on)


def test_off_is_said_to_every_model_that_becomes_ready(tmp_path: Path) -> None:
    store, engine = SettingsStore(tmp_path), Told()
    watch = PredictionWatch(store, engine, Progress)
    watch.view(READY, None)
    assert engine.told == []  # an engine begins with it on
    store.update(prediction=False)
    for status in (
        replace(READY, state="loading", loading="n"),
        replace(READY, model="n"),
        replace(READY, model="n"),
        replace(READY, state="restarting", model="n"),
        replace(READY, model="n", restarts=1),
    ):
        watch.view(status, None)
    assert engine.told == [False, False]


def test_the_pair_is_measured_on_the_tokens_of_the_chats(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path)
    progress = Progress()
    watch = PredictionWatch(store, Told(), lambda: progress)
    view = watch.view(READY, NOW)
    for step in range(200):
        if step == 100:
            store.update(prediction=False)
        tokens = 10 if step < 100 else 8
        progress = Progress(progress.tokens + tokens, step / 4, 1, 1)
        view = watch.view(READY, NOW)
    assert view.switched is not None
    assert (view.switched.text, view.switched.change) == ("40.0 → 32.0 tok/s", "−20 %")
    store.update(prediction=True)
    other = watch.view(READY, replace(NOW, cache_slots=1))
    assert other.switched is None  # not the same cache any more
