"""Chats over an engine that says only what a test feeds it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from app.history import History, StoredMessage
from app.session import ChatSessions, ConversationView
from app.settings import SettingsStore
from runtime.core import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    Message,
    SamplingParams,
)
from tests.fake_engine import FakeEngine

SOON_S = 10.0
STATS = GenerationStats(emulated=True, device="test", policy="hybrid", new_tokens=7)


class Stream:
    """A generation whose chunks the test feeds one by one; closing it is seen at once."""

    def __init__(self) -> None:
        self.fed: queue.SimpleQueue[GenerationChunk | Exception | None] = queue.SimpleQueue()
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        chunk = self.fed.get()
        if chunk is None:
            raise StopIteration
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def close(self) -> None:
        self.closed.set()
        self.fed.put(None)

    def say(self, text: str, thinking: bool = False) -> None:
        self.fed.put(Delta("reasoning" if thinking else "answer", text))

    def finish(self, reason: FinishReason = "stop") -> None:
        self.fed.put(Finished(reason, STATS))


class SteppedEngine(FakeEngine):
    """Answers only what a test feeds into the newest stream of a conversation."""

    def __init__(self, before: Callable[[str], None] = lambda id_: None) -> None:
        super().__init__()
        self.streams: dict[str, Stream] = {}
        self.params: list[SamplingParams] = []
        self.asked = threading.Condition()
        self.before = before

    def generate(
        self, conversation_id: str, messages: Sequence[Message], params: SamplingParams
    ) -> Iterator[GenerationChunk]:
        self.before(conversation_id)
        with self.asked:
            self.prompts.append(list(messages))
            self.params.append(params)
            stream = self.streams[conversation_id] = Stream()
            self.asked.notify_all()
        stream.fed.put(Accepted(3))
        return iter(stream)

    def stream(self, conversation_id: str, count: int) -> Stream:
        """Return the stream of the `count`-th question of this engine."""
        with self.asked:
            assert self.asked.wait_for(lambda: len(self.prompts) >= count, SOON_S)
            return self.streams[conversation_id]


class Rig:
    """History, settings and sessions over one engine, opened and closed together."""

    def __init__(self, folder: Path, engine: FakeEngine) -> None:
        self.folder = folder
        self.engine = engine
        self.open()

    def open(self) -> None:
        self.history = History(self.folder)
        self.settings = SettingsStore(self.folder)
        self.sessions = ChatSessions(self.history, self.settings, self.engine)

    def close(self) -> None:
        self.sessions.close()
        self.history.close()

    def settled(self, chat: str) -> list[StoredMessage]:
        """Wait until the conversation is not answering any more and return its turns."""
        deadline = time.monotonic() + SOON_S
        view = self.sessions.view(chat)
        while view.live is not None:
            assert time.monotonic() < deadline, view
            view = self.sessions.wait(chat, view.live.version, 1.0)
        return view.messages

    def until(self, chat: str, seen: Callable[[ConversationView], bool]) -> ConversationView:
        """Wait until the view is as wanted."""
        deadline = time.monotonic() + SOON_S
        view = self.sessions.view(chat)
        while not seen(view):
            assert time.monotonic() < deadline, view
            view = self.sessions.wait(chat, view.live.version if view.live else -1, 1.0)
        return view


def live_text(view: ConversationView) -> str:
    return view.live.text if view.live else ""
