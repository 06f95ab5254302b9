"""The model picker: what can be chosen, and loading it."""

from __future__ import annotations

import itertools
from typing import Any

import gradio as gr

from app.models import ModelOffer, ModelShelf
from app.settings import SettingsStore
from app.ui_layout import Parts
from runtime.client import EngineClient
from runtime.errors import PreScopeError


class ModelEvents:
    """The handlers of the model picker; stateless between calls."""

    def __init__(
        self, parts: Parts, store: SettingsStore, engine: EngineClient, models: ModelShelf
    ) -> None:
        self._parts = parts
        self._store = store
        self._engine = engine
        self._models = models
        self._count = itertools.count(1)

    def listed(self) -> Any:
        """Return the choices of the picker, with the chosen model selected."""
        choices = [(_label(model), model.path) for model in self._models()]
        chosen = self._store.current().model
        if chosen not in [path for _, path in choices]:
            choices.append((chosen, chosen))
        return gr.update(choices=choices, value=chosen)

    def loaded(self, path: str) -> Any:
        """Remember the choice and start loading it."""
        for model in self._models():
            if model.path == path and not model.supported:
                return self._note(f"{model.label} cannot be loaded. {model.why}", "")
        return self._load(path)

    def reloaded(self) -> Any:
        """Load the chosen model again, with the settings as they are now."""
        return self._load(self._store.current().model)

    def cancelled(self) -> None:
        """Give up the load under way."""
        self._engine.cancel_load()

    def _load(self, path: str) -> Any:
        try:
            settings = self._store.update(model=path)
            self._engine.load(settings.load_request())
        except PreScopeError as error:
            return self._note(error.message, error.next_step)
        return None

    def _note(self, text: str, next_step: str) -> dict[str, Any]:
        return {"text": text, "next": next_step, "n": f"m{next(self._count)}"}


def _label(model: ModelOffer) -> str:
    said = [model.label]
    if model.size_bytes:
        said.append(_size(model.size_bytes))
    if model.why:
        said.append("not supported")
    elif model.plan:
        said.append(model.plan)
    return " \N{MIDDLE DOT} ".join(said)


def _size(size_bytes: int) -> str:
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.0f} GB"
    return f"{size_bytes / 1e6:.0f} MB"
