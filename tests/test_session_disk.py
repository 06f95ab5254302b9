"""The disk while a chat is answered: it has the question first, then the text so far, then all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import answer as answer_module
from app.database import HistoryError
from app.history import INTERRUPTED, StoredMessage
from runtime.core import Delta, Finished, GenerationChunk
from tests.chat_rigs import SOON_S, STATS, Rig, SteppedEngine, live_text
from tests.fake_engine import FakeEngine


@pytest.fixture
def stepped(tmp_path: Path) -> Iterator[tuple[Rig, SteppedEngine]]:
    engine = SteppedEngine()
    made = Rig(tmp_path, engine)
    yield made, engine
    made.close()


def test_a_question_is_on_disk_before_the_engine_hears_it(tmp_path: Path) -> None:
    seen: list[list[StoredMessage]] = []
    engine = SteppedEngine(before=lambda id_: seen.append(opened.history.messages(id_)))
    opened = rig = Rig(tmp_path, engine)
    chat = rig.sessions.send(None, "first")
    engine.stream(chat, 1).finish()
    rig.settled(chat)
    assert [(turn.role, turn.content, turn.state) for turn in seen[0]] == [
        ("user", "first", "complete"),
        ("assistant", "", "partial"),
    ]
    rig.close()


def test_text_so_far_reaches_the_disk_while_the_engine_is_silent(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "go")
    stream = engine.stream(chat, 1)
    stream.say("Hm.", thinking=True)
    stream.say("One")
    stream.say(" two")
    deadline = time.monotonic() + SOON_S
    while rig.history.messages(chat)[-1].content != "One two":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    last = rig.history.messages(chat)[-1]
    assert (last.reasoning, last.state) == ("Hm.", "partial")
    stream.finish()
    assert rig.settled(chat)[-1].state == "complete"


def test_text_so_far_reaches_the_disk_while_tokens_never_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "SAVE_EVERY_S", 0.05)
    saved = threading.Event()

    class Endless(FakeEngine):
        def generate(self, *given: Any) -> Iterator[GenerationChunk]:
            while not saved.is_set():
                yield Delta("answer", "x")
                time.sleep(0)
            yield Finished("stop", STATS)

    rig = Rig(tmp_path, Endless())
    chat = rig.sessions.send(None, "go")
    deadline = time.monotonic() + SOON_S
    while not rig.history.messages(chat)[-1].content:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    saved.set()
    assert rig.settled(chat)[-1].state == "complete"
    rig.close()


def test_saves_do_not_grow_with_the_number_of_tokens(
    stepped: tuple[Rig, SteppedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, engine = stepped
    saves: list[str] = []
    save = rig.history.save_answer

    def save_answer(*given: Any) -> None:
        saves.append(given[1])
        save(*given)

    monkeypatch.setattr(rig.history, "save_answer", save_answer)
    monkeypatch.setattr(answer_module, "SAVE_EVERY_S", 3600.0)
    chat = rig.sessions.send(None, "go")
    stream = engine.stream(chat, 1)
    for _ in range(500):
        stream.say("x")
    stream.finish()
    assert rig.settled(chat)[-1].content == "x" * 500
    assert saves == ["x" * 500]


def test_closing_the_app_keeps_the_text_for_the_next_start(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "go")
    engine.stream(chat, 1).say("half an ans")
    rig.until(chat, lambda view: live_text(view) == "half an ans")
    rig.close()
    assert engine.streams[chat].closed.is_set()
    rig.open()
    last = rig.sessions.view(chat).messages[-1]
    assert (last.content, last.state, last.error) == ("half an ans", "failed", INTERRUPTED)


def test_an_answer_the_disk_refuses_is_kept_and_saved_later(
    stepped: tuple[Rig, SteppedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, engine = stepped
    monkeypatch.setattr(answer_module, "SAVE_EVERY_S", 0.02)
    full = threading.Event()
    full.set()
    save = rig.history.save_answer

    def save_answer(*given: Any) -> None:
        if full.is_set():
            raise HistoryError("The disk is full.", "Free some space.")
        save(*given)

    monkeypatch.setattr(rig.history, "save_answer", save_answer)
    chat = rig.sessions.send(None, "go")
    engine.stream(chat, 1).say("precious")
    engine.stream(chat, 1).finish()
    view = rig.until(chat, lambda v: v.live is not None and "disk is full" in v.live.notice)
    assert live_text(view) == "precious"
    full.clear()
    assert rig.settled(chat)[-1].content == "precious"
    assert rig.settled(chat)[-1].state == "complete"
