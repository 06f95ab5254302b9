"""The switch of prediction as all pages see it: what was chosen, what happens, what it brought."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from app.pace import PaceMeter, Pair, Progress, compared
from app.policies import policy_text
from app.settings import SettingsStore
from runtime.client import EngineClient
from runtime.core import POLICIES, EngineStatus, TelemetrySnapshot

PredictionState = Literal["working", "waiting", "paused", "off", "never", "none"]


@dataclass(frozen=True)
class Compared:
    """Tokens/s on two sides. `change` is empty while the second is being measured."""

    label: str
    text: str
    change: str = ""


@dataclass(frozen=True)
class PredictionView:
    """What the pages show beside the figures of the snapshot.

    `on` is what a person chose. `state` says whether there are figures (`working`); in every other
    state `text` stands in their place. Otherwise it is the verdict of the engine's controller.
    `trial` is the controller's own pair, `switched` the pair around the last use of the switch.
    """

    on: bool
    state: PredictionState
    text: str
    trial: Compared | None = None
    switched: Compared | None = None


def prediction_view(
    on: bool, snapshot: TelemetrySnapshot | None, pair: Pair | None = None
) -> PredictionView:
    """Return what the pages show for a choice, the engine's picture, and a measured pair."""
    if snapshot is None:
        return PredictionView(on, "none", "Figures come with a model.")
    policy = policy_text(snapshot.policy)
    if not policy.predicts:
        return PredictionView(on, "never", _never(snapshot.policy))
    state, text = _state(on, snapshot)
    return PredictionView(on, state, text, _trial(snapshot), _switched(pair))


def _never(policy: str) -> str:
    if policy == "cpu-only":
        return "Every expert runs on the CPU: there is nothing to copy ahead."
    text = f"The policy {policy_text(policy).label} copies nothing ahead."
    return f"{text} PreScope does: choose it in the settings." if "prescope" in POLICIES else text


def _state(on: bool, now: TelemetrySnapshot) -> tuple[PredictionState, str]:
    if not on:
        return "off", "Prediction is off: experts move when their layer asks for them."
    if not now.prediction:
        return "paused", now.verdict or "Nothing is copied ahead just now."
    if not any(now.prefetch_bytes_per_token) and now.predictor_recall is None:
        return "waiting", "Figures come with the first answer."
    return "working", now.verdict or "No verdict yet: both ways are compared while answers run."


def _trial(now: TelemetrySnapshot) -> Compared | None:
    if now.trial_tokens_per_s is None:
        return None
    return Compared(
        "Engine's trials, off \N{RIGHTWARDS ARROW} on", *compared(*now.trial_tokens_per_s)
    )


def _switched(pair: Pair | None) -> Compared | None:
    if pair is None:
        return None
    sides = ("off", "on") if pair.on else ("on", "off")
    label = f"Your switch, {sides[0]} \N{RIGHTWARDS ARROW} {sides[1]}"
    return Compared(label, *compared(pair.before, pair.after))


class PredictionWatch:
    """Applies the stored choice to every model that becomes ready, and measures switches.

    Engines begin with prediction on, so only off has to be said. One thread calls `view` as often
    as there is something to show.
    """

    def __init__(
        self, settings: SettingsStore, engine: EngineClient, progress: Callable[[], Progress]
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._progress = progress
        self._meter = PaceMeter()
        self._ready: tuple[str | None, int] | None = None

    def view(self, status: EngineStatus, snapshot: TelemetrySnapshot | None) -> PredictionView:
        """Return what the pages show of prediction now."""
        on = self._settings.current().prediction
        ready = (status.model, status.restarts) if status.state == "ready" else None
        if ready is not None and ready != self._ready and not on:
            self._engine.set_prediction(False)
        self._ready = ready
        if snapshot is not None and policy_text(snapshot.policy).predicts:
            subject = (snapshot.model, snapshot.policy, snapshot.cache_slots)
            self._meter.sample(self._progress(), on, subject)
        return prediction_view(on, snapshot, self._meter.pair)
