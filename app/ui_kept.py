"""The list of kept experts in the settings: shown when the drawer opens, deleted line by line."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import gradio as gr

from app.kept import KeptShelf
from runtime.errors import PreScopeError


class KeptEvents:
    """The handlers of the list; stateless between calls."""

    def __init__(self, shelf: KeptShelf) -> None:
        self._shelf = shelf
        self._count = itertools.count(1)

    def listed(self) -> dict[str, Any]:
        """Return what is kept now."""
        return self._shown("", bad=False)

    def deleted(self, event: gr.EventData) -> dict[str, Any]:
        """Delete the file the event names, and say what came of it."""
        try:
            self._shelf.delete(str(event.name))
        except PreScopeError as error:
            return self._shown(f"{error.message} {error.next_step}".strip(), bad=True)
        return self._shown("Deleted.", bad=False)

    def _shown(self, text: str, *, bad: bool) -> dict[str, Any]:
        files = [asdict(offer) for offer in self._shelf()]
        return {"files": files, "text": text, "bad": bad, "n": next(self._count)}
