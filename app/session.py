"""Chats in motion: the only user of the engine for chat.

An answer is a job that outlives any page: it runs on its own threads, saves the text at least once
a second and always at its end. Pages only watch (`wait`) and ask (`send`, `stop`, ...).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from app.answer import Answer, LiveAnswer
from app.history import UNTITLED, ConversationSummary, History, StoredMessage
from app.pace import Progress
from app.settings import Settings, SettingsStore
from runtime.client import EngineClient
from runtime.core import GenerationChunk, Message
from runtime.errors import BusyError, RequestError

__all__ = [
    "ChatSessions",
    "ConversationSummary",
    "ConversationView",
    "LiveAnswer",
    "StoredMessage",
]

MAX_MESSAGE_CHARACTERS = 1_000_000
_TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class ConversationView:
    """One conversation at one moment: the settled turns, and the answer being written.

    A conversation that is gone is an empty view. `messages` never contains the live answer.
    """

    id: str
    title: str
    messages: list[StoredMessage]
    live: LiveAnswer | None = None


class ChatSessions:
    """Owns the running answers; every method may be called from any thread. `close` once.

    `HistoryError` may come out of every method that reads or writes the disk.
    """

    def __init__(
        self, history: History, settings_store: SettingsStore, engine: EngineClient
    ) -> None:
        self._history = history
        self._settings = settings_store
        self._engine = engine
        self._changed = threading.Condition()
        self._answers: dict[str, Answer] = {}
        self._versions = itertools.count(1)
        self._progress = Progress()

    def conversations(self, query: str = "") -> list[ConversationSummary]:
        """Return the newest conversations first; with a query, those that contain its words."""
        return self._history.conversations(query)

    def create(self) -> str:
        """Add an empty conversation and return its id."""
        return self._history.create()

    def rename(self, id: str, title: str) -> None:
        """Set the title; an empty one is ignored."""
        if title.strip():
            self._history.rename(id, " ".join(title.split())[:200])

    def delete(self, id: str) -> None:
        """Stop the answer under way, if any, and remove the conversation for good."""
        with self._changed:
            answer = self._answers.pop(id, None)
            self._changed.notify_all()
        if answer is not None:
            answer.abandon()
        self._history.delete(id)

    def view(self, id: str) -> ConversationView:
        """Return the conversation as it is now."""
        with self._changed:
            return self._view(id)

    def send(self, id: str | None, text: str) -> str:
        """Store the message, start the answer, and return the conversation's id.

        None starts a new conversation, titled after the message.

        Raises:
            RequestError: the text is empty or too long, or the conversation is gone.
            BusyError: this conversation is already answering.
        """
        _check(text)
        with self._changed:
            if id is None:
                id = self._history.create()
            self._check_free(id)
            if self._history.title(id) == UNTITLED:
                self._history.rename(id, _title(text))
            _, answer_id = self._history.ask(id, text)
            self._start(id, answer_id)
        return id

    def stop(self, id: str) -> None:
        """End the answer under way, keeping its text; does nothing when there is none."""
        with self._changed:
            answer = self._answers.get(id)
        if answer is not None:
            answer.stop()

    def retry(self, id: str, message_id: int) -> None:
        """Answer again: what follows the user message of `message_id` is replaced.

        Raises:
            RequestError: there is no such message.
            BusyError: this conversation is already answering.
        """
        with self._changed:
            self._check_free(id)
            self._start(id, self._history.ask_again(id, message_id))

    def edit(self, id: str, message_id: int, text: str) -> None:
        """Replace a user message, forget what followed it, and answer it.

        Raises:
            RequestError: the text is empty or too long, or there is no such message.
            BusyError: this conversation is already answering.
        """
        _check(text)
        with self._changed:
            self._check_free(id)
            self._start(id, self._history.ask_again(id, message_id, text))

    def wait(self, id: str, version: int, timeout_s: float) -> ConversationView:
        """Return the view once the live answer is not at `version` any more, or time is up.

        Returns at once when nothing is being answered; `version` -1 never matches.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (answer := self._answers.get(id)) is not None and answer.live.version == version:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._view(id)

    def answering(self) -> int:
        """Return how many answers are under way."""
        return len(self._answers)

    def progress(self) -> Progress:
        """Return how many tokens all answers have brought, and when the last one came."""
        with self._changed:
            return replace(self._progress, answering=len(self._answers))

    def close(self) -> None:
        """Save every answer under way as it is and end it; the engine stays open."""
        with self._changed:
            answers = list(self._answers.values())
        for answer in answers:
            answer.suspend()
        for answer in answers:
            answer.join(2.0)

    def _check_free(self, id: str) -> None:
        if id in self._answers:
            raise BusyError("This chat is still answering.", "Wait for the answer or stop it.")

    def _start(self, id: str, answer_id: int) -> None:
        settings = self._settings.current()
        settled = [turn for turn in self._history.messages(id) if turn.id != answer_id]
        prompt = _prompt(settings.system_prompt, settled)
        answer = Answer(
            history=self._history,
            message_id=answer_id,
            settled=settled,
            open_stream=lambda: self._ask(id, prompt, settings),
            publish=lambda now: self._publish(id, now),
            on_end=lambda: self._end(id, answer_id),
        )
        self._answers[id] = answer
        self._progress = replace(self._progress, started=self._progress.started + 1)
        self._publish(id, answer.live)
        answer.start()

    def _ask(self, id: str, prompt: list[Message], settings: Settings) -> Iterator[GenerationChunk]:
        if not settings.prediction:  # an engine that was started again since begins with it on
            self._engine.set_prediction(False)
        return self._engine.generate(id, prompt, settings.sampling)

    def _publish(self, id: str, now: LiveAnswer) -> None:
        """Let every page that waits see `now`, under a version of its own."""
        with self._changed:
            answer = self._answers.get(id)
            if answer is not None and answer.message_id == now.message_id:
                fresh = now.tokens - answer.live.tokens
                if fresh:
                    self._progress = replace(
                        self._progress,
                        tokens=self._progress.tokens + fresh,
                        last_token_s=time.monotonic(),
                    )
                answer.live = replace(now, version=next(self._versions))
                self._changed.notify_all()

    def _end(self, id: str, answer_id: int) -> None:
        with self._changed:
            answer = self._answers.get(id)
            if answer is not None and answer.message_id == answer_id:
                del self._answers[id]
                self._changed.notify_all()

    def _view(self, id: str) -> ConversationView:
        title = self._history.title(id) or ""
        answer = self._answers.get(id)
        if answer is None:
            return ConversationView(id, title, self._history.messages(id))
        return ConversationView(id, title, answer.settled, answer.live)


def _check(text: str) -> None:
    if not text.strip():
        raise RequestError("The message is empty.", "Write something first.")
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise RequestError(
            f"The message has {len(text):,} characters; at most {MAX_MESSAGE_CHARACTERS:,} fit.",
            "Send a shorter part of it.",
        )


def _title(text: str) -> str:
    """Return the first line of a message, cut at a word."""
    line = " ".join(text.strip().splitlines()[0].split())
    if len(line) <= _TITLE_CHARACTERS:
        return line
    head = line[:_TITLE_CHARACTERS]
    return (head.rsplit(" ", 1)[0] if " " in head[20:] else head) + "\N{HORIZONTAL ELLIPSIS}"


def _prompt(system_prompt: str, turns: list[StoredMessage]) -> list[Message]:
    """Return what the engine sees: answers without text drop out, same roles in a row join.

    Many chat templates refuse two user turns in a row, which is what an answer that failed
    before its first word leaves behind.
    """
    prompt = [Message("system", system_prompt)] if system_prompt.strip() else []
    for turn in turns:
        if not turn.content:
            continue
        if prompt and prompt[-1].role == turn.role:
            prompt[-1] = Message(turn.role, f"{prompt[-1].content}\n\n{turn.content}")
        else:
            prompt.append(Message(turn.role, turn.content))
    return prompt
