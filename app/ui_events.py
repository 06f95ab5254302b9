"""What happens when something on the page is used: from components to the session and back.

Handlers return updates keyed by component. An error a person may see goes to the status part; the
text somebody typed is never cleared by a handler that failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gradio as gr

from app.session import ChatSessions, ConversationView
from app.ui_layout import Parts
from app.ui_rows import SHOWN_TURNS, list_rows, live_rows, settled_rows, turn_at
from app.ui_text import plain
from runtime.errors import PreScopeError

NOTHING = ConversationView("", "", [])
Updates = dict[Any, Any]


class ChatEvents:
    """The handlers of the chat and of the list of chats; stateless between calls.

    Answers can overtake each other on a slow machine, so each tells the page what it was asked
    for (`asked`, or the conversation that was pulled), and the page asks again when it moved on.
    """

    def __init__(self, parts: Parts, sessions: ChatSessions) -> None:
        self._parts = parts
        self._sessions = sessions
        self._count = itertools.count(1)

    def opened(self, query: str, event: gr.EventData) -> Updates:
        """Show the conversation the event names."""
        return self.restored(event.id, query)

    def restored(self, conv: str, query: str) -> Updates:
        """Show a conversation; one that is gone gives a new, empty chat."""
        view = self._sessions.view(conv) if conv else NOTHING
        gone = bool(conv) and _is_gone(view)
        shown = self._shown(NOTHING if gone else view, gone=gone, asked=conv)
        return shown | self._list(query)

    def blank(self, query: str) -> Updates:
        """Start a new chat; it is stored with its first message."""
        return self._shown(NOTHING, gone=True, asked="") | self._list(query)

    def sent(self, text: str, conv: str, query: str) -> Updates:
        """Store the message and start its answer."""
        if not text.strip():
            return {self._parts.box: gr.skip()}
        return self._started(
            lambda: self._sessions.send(conv or None, text), query, clear=True, created=not conv
        )

    def asked(self, conv: str, query: str, event: gr.EventData) -> Updates:
        """Send one of the example questions."""
        return self._started(
            lambda: self._sessions.send(conv or None, event.text), query, created=not conv
        )

    def stopped(self, conv: str) -> None:
        """End the answer under way; the next pull shows what it became."""
        if conv:
            self._sessions.stop(conv)

    def retried(self, conv: str, query: str, earlier: Any, event: gr.RetryData) -> Updates:
        """Answer the last question again."""

        def start() -> str:
            turn = turn_at(self._visible(conv, earlier), event.index)
            if turn is not None:
                self._sessions.retry(conv, turn.id)
            return conv

        return self._started(start, query)

    def edited(self, conv: str, query: str, earlier: Any, event: gr.EditData) -> Updates:
        """Replace a question and answer it."""

        def start() -> str:
            turn = turn_at(self._visible(conv, earlier), event.index)
            if turn is not None and turn.role == "user":
                self._sessions.edit(conv, turn.id, plain(str(event.value)))
            return conv

        return self._started(start, query)

    def pulled(self, conv: str, query: str, earlier: Any, event: gr.EventData) -> Updates:
        """Bring the newest text of the answer under way, or the settled turns at its end.

        It never waits: all tabs of a browser share six sockets, and one held here is one less
        for a tab that loads, or for Stop.
        """
        version = event.version if isinstance(event.version, int) else -1
        view = self._sessions.view(conv)
        if view.live is None:
            if _is_gone(view):
                return self.blank(query)
            shown = self._shown(view, pulled=True, changed=True, shown=_shown_of(earlier))
            return shown | self._list(query)
        updates: Updates = {self._parts.pulse: self._pulse(view, pulled=True)}
        if view.live.version != version:
            updates[self._parts.live] = live_rows(view.live)
        return updates

    def listed(self, query: str) -> Updates:
        """Show the chats that match the search."""
        return self._list(query)

    def renamed(self, conv: str, query: str, event: gr.EventData) -> Updates:
        """Change a title."""
        return self._changed(
            lambda: self._sessions.rename(event.id, str(event.title)), conv, query, event.id
        )

    def deleted(self, conv: str, query: str, event: gr.EventData) -> Updates:
        """Remove a chat for good; if it is the open one, a new chat takes its place."""
        updates = self._changed(lambda: self._sessions.delete(event.id), conv, query, event.id)
        if event.id == conv and self._parts.status not in updates:
            updates |= self._shown(NOTHING, gone=True, changed=True, about=event.id)
        return updates

    def grown(self, conv: str, earlier: Any) -> Updates:
        """Show more of the older turns."""
        return self._shown(
            self._sessions.view(conv), shown=_shown_of(earlier) + SHOWN_TURNS, still=True
        )

    def _started(
        self, start: Callable[[], str], query: str, *, clear: bool = False, created: bool = False
    ) -> Updates:
        try:
            conv = start()
        except PreScopeError as error:
            return {self._parts.status: self.note(error)}
        shown = self._shown(self._sessions.view(conv), created=created, changed=True)
        if clear:
            shown[self._parts.box] = gr.update(value="", submit_btn=False, stop_btn=True)
        return shown | self._list(query) | {self._parts.status: None}

    def _changed(self, change: Callable[[], None], conv: str, query: str, about: str) -> Updates:
        try:
            change()
        except PreScopeError as error:
            return {self._parts.status: self.note(error)}
        view = self._sessions.view(conv) if conv else NOTHING
        pulse = self._pulse(view, changed=True, about=about)
        return self._list(query) | {self._parts.pulse: pulse}

    def _shown(self, view: ConversationView, shown: int = SHOWN_TURNS, **marks: Any) -> Updates:
        parts = self._parts
        running = view.live is not None
        hidden = max(0, len(view.messages) - shown)
        return {
            parts.conv: view.id,
            parts.chat: settled_rows(view.messages[hidden:]),
            parts.live: live_rows(view.live),
            parts.box: gr.update(submit_btn=not running, stop_btn=running),
            parts.earlier: {"shown": shown, "hidden": hidden},
            parts.pulse: self._pulse(view, **marks),
        }

    def _visible(self, conv: str, earlier: Any) -> list[Any]:
        messages = self._sessions.view(conv).messages
        return messages[max(0, len(messages) - _shown_of(earlier)) :]

    def _pulse(self, view: ConversationView, **marks: Any) -> dict[str, Any]:
        live = view.live
        return {
            "conv": view.id,
            "live": live is not None,
            "version": live.version if live else 0,
            "n": next(self._count),
            **marks,
        }

    def _list(self, query: str) -> Updates:
        return {self._parts.clist: list_rows(self._sessions.conversations(query), query)}

    def note(self, error: PreScopeError) -> dict[str, Any]:
        """Return the value of the status part that shows an error."""
        return {"text": error.message, "next": error.next_step, "n": next(self._count)}


def _is_gone(view: ConversationView) -> bool:
    """Tell whether the chat was deleted; one that exists has a title."""
    return not view.title and not view.messages and view.live is None


def _shown_of(earlier: Any) -> int:
    shown = earlier.get("shown") if isinstance(earlier, dict) else None
    return shown if isinstance(shown, int) and shown > 0 else SHOWN_TURNS
