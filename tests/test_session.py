"""Chats in motion: every page sees the same answer, and every answer ends once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.session import MAX_MESSAGE_CHARACTERS, ConversationView
from runtime.core import Accepted, Delta, Finished, GenerationChunk, Message, SamplingParams
from runtime.errors import BusyError, EngineDiedError, PreScopeError, RequestError
from tests.chat_rigs import SOON_S, STATS, Rig, SteppedEngine, live_text
from tests.fake_engine import FakeEngine


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, FakeEngine(tokens_per_s=2000))
    yield made
    made.close()


@pytest.fixture
def stepped(tmp_path: Path) -> Iterator[tuple[Rig, SteppedEngine]]:
    engine = SteppedEngine()
    made = Rig(tmp_path, engine)
    yield made, engine
    made.close()


def test_an_answer_needs_no_page(rig: Rig) -> None:
    chat = rig.sessions.send(None, "How does it work? !think\nSecond line")
    asked, answered = rig.settled(chat)
    assert (asked.role, asked.content) == ("user", "How does it work? !think\nSecond line")
    assert answered.state == "complete"
    assert answered.content.startswith("Only a few **experts**")
    assert answered.reasoning.startswith("The person asks")
    assert answered.stats["finish_reason"] == "stop"
    assert answered.stats["new_tokens"] > 20
    assert (
        sum(v for k, v in answered.stats.items() if k.startswith("served_"))
        == (answered.stats["routed"])
    )
    assert [c.title for c in rig.sessions.conversations()] == ["How does it work? !think"]


def test_live_states_follow_the_answer(stepped: tuple[Rig, SteppedEngine]) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "go")
    first = rig.sessions.view(chat)
    assert first.live is not None
    assert first.live.state == "waiting"
    assert [turn.role for turn in first.messages] == ["user"]
    stream = engine.stream(chat, 1)
    stream.say("thought", thinking=True)
    view = rig.until(chat, lambda v: v.live is not None and v.live.state == "reasoning")
    stream.say("word")
    after = rig.until(chat, lambda v: v.live is not None and v.live.state == "answering")
    assert view.live is not None
    assert after.live is not None
    assert first.live.version < view.live.version < after.live.version
    assert (after.live.reasoning, after.live.text) == ("thought", "word")
    stream.finish()
    rig.settled(chat)


def test_wait_returns_at_once_when_nothing_runs_and_in_time_when_nothing_moves(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    assert rig.sessions.wait("gone", 5, 3600.0) == ConversationView("gone", "", [])
    chat = rig.sessions.send(None, "go")
    live = rig.sessions.view(chat).live
    assert live is not None
    assert rig.sessions.wait(chat, live.version, 0.01).live == live
    engine.stream(chat, 1).finish()
    assert rig.sessions.wait(chat, live.version, 3600.0).live is None
    rig.settled(chat)


@pytest.mark.parametrize("text", ["", "  \n\t", "x" * (MAX_MESSAGE_CHARACTERS + 1)])
def test_unusable_messages_are_refused_and_leave_no_chat(rig: Rig, text: str) -> None:
    with pytest.raises(RequestError):
        rig.sessions.send(None, text)
    assert rig.sessions.conversations() == []


def test_a_chat_that_answers_takes_no_second_question(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "one")
    (asked,) = rig.sessions.view(chat).messages
    for refused in (
        lambda: rig.sessions.send(chat, "two"),
        lambda: rig.sessions.retry(chat, asked.id),
        lambda: rig.sessions.edit(chat, asked.id, "other"),
    ):
        with pytest.raises(BusyError, match="still answering"):
            refused()
    engine.stream(chat, 1).finish()
    assert len(rig.settled(chat)) == 2


def test_of_many_tabs_that_send_at_once_one_is_answered(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    chat = rig.sessions.create()
    together = threading.Barrier(8)
    outcomes: list[str] = []

    def send(number: int) -> None:
        together.wait(SOON_S)
        try:
            rig.sessions.send(chat, f"from tab {number}")
        except BusyError:
            outcomes.append("busy")
        else:
            outcomes.append("sent")

    tabs = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert sorted(outcomes) == ["busy"] * 7 + ["sent"]
    engine.stream(chat, 1).finish()
    assert len(rig.settled(chat)) == 2


def test_two_chats_answer_at_the_same_time(stepped: tuple[Rig, SteppedEngine]) -> None:
    rig, engine = stepped
    one, two = rig.sessions.send(None, "one"), rig.sessions.send(None, "two")
    assert rig.sessions.answering() == 2
    engine.stream(two, 2).say("second")
    engine.stream(two, 2).finish()
    assert rig.settled(two)[-1].content == "second"
    engine.stream(one, 2).say("first")
    engine.stream(one, 2).finish()
    assert rig.settled(one)[-1].content == "first"


def test_sixteen_chats_stream_at_once_and_every_token_is_counted(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    chats = [rig.sessions.send(None, f"chat {number}") for number in range(16)]
    with engine.asked:
        assert engine.asked.wait_for(lambda: len(engine.streams) == len(chats), SOON_S)
    for round_ in range(1, 4):
        for chat in chats:
            engine.streams[chat].fed.put(Delta("answer", "word ", (round_, round_)))
        for chat in chats:
            written = "word " * round_
            rig.until(chat, lambda view, w=written: bool(view.live and view.live.text == w))
        assert rig.sessions.progress().tokens == 2 * round_ * len(chats)
    with pytest.raises(BusyError):
        rig.sessions.send(chats[3], "one answer at a time")
    before = rig.sessions.progress()
    assert (before.answering, before.started) == (16, 16)
    assert before.last_token_s <= time.monotonic()
    for chat in reversed(chats):
        engine.streams[chat].finish()
    for chat in chats:
        assert rig.settled(chat)[-1].content == "word " * 3
    after = rig.sessions.progress()
    assert (after.answering, after.tokens) == (0, before.tokens)


def test_a_question_tells_the_engine_that_prediction_is_off(tmp_path: Path) -> None:
    told: list[bool] = []

    class Told(FakeEngine):
        def set_prediction(self, on: bool) -> None:
            told.append(on)

    made = Rig(tmp_path, Told(tokens_per_s=2000))
    chat = made.sessions.send(None, "as it comes")
    made.settled(chat)
    assert told == []
    made.settings.update(prediction=False)
    made.sessions.send(chat, "and now without")
    made.settled(chat)
    assert told == [False]
    made.close()


@pytest.mark.parametrize("said", ["", "some text"])
def test_stop_keeps_the_text(stepped: tuple[Rig, SteppedEngine], said: str) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "go")
    stream = engine.stream(chat, 1)
    if said:
        stream.say(said)
    rig.until(chat, lambda view: live_text(view) == said)
    rig.sessions.stop(chat)
    last = rig.settled(chat)[-1]
    assert (last.content, last.state, last.error) == (said, "stopped", "")
    assert stream.closed.wait(SOON_S)
    rig.sessions.stop(chat)


def test_stop_does_not_wait_for_an_engine_that_is_stuck(tmp_path: Path) -> None:
    """A generator cannot be closed from outside; the answer ends all the same."""
    release = threading.Event()

    class Stuck(FakeEngine):
        def generate(self, *given: Any) -> Iterator[GenerationChunk]:
            yield Accepted(1)
            release.wait(SOON_S)
            yield Delta("answer", "too late")
            yield Finished("stop", STATS)

    rig = Rig(tmp_path, Stuck())
    chat = rig.sessions.send(None, "go")
    rig.sessions.stop(chat)
    assert rig.settled(chat)[-1].state == "stopped"
    release.set()
    time.sleep(0.05)
    assert rig.settled(chat)[-1].content == ""
    rig.close()


@pytest.mark.parametrize(
    ("failure", "state", "error"),
    [
        (EngineDiedError("The engine ended.", "Retry."), "failed", "The engine ended. Retry."),
        (RequestError("No."), "failed", "No."),
        (None, "failed", "The engine ended this answer without saying why."),
    ],
)
def test_an_answer_that_breaks_off_keeps_its_text_and_says_why(
    stepped: tuple[Rig, SteppedEngine], failure: PreScopeError | None, state: str, error: str
) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "go")
    engine.stream(chat, 1).say("so far")
    engine.stream(chat, 1).fed.put(failure)
    last = rig.settled(chat)[-1]
    assert (last.content, last.state, last.error) == ("so far", state, error)


@pytest.mark.parametrize("word", ["!refuse", "!busy", "!die"])
def test_the_fake_engines_refusals_end_the_answer(rig: Rig, word: str) -> None:
    chat = rig.sessions.send(None, f"please {word}")
    last = rig.settled(chat)[-1]
    assert last.state == "failed"
    assert last.error
    assert bool(last.content) == (word == "!die")


def test_a_bug_in_the_engine_client_ends_the_answer_too(
    stepped: tuple[Rig, SteppedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, engine = stepped
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda given: seen.append(given.exc_type))
    chat = rig.sessions.send(None, "go")
    engine.stream(chat, 1).fed.put(ZeroDivisionError())
    assert rig.settled(chat)[-1].state == "failed"
    deadline = time.monotonic() + SOON_S
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [ZeroDivisionError]


def test_retry_replaces_the_answer_and_edit_what_follows(rig: Rig) -> None:
    chat = rig.sessions.send(None, "one")
    rig.settled(chat)
    rig.sessions.send(chat, "two")
    one, first, two, second = rig.settled(chat)
    rig.sessions.retry(chat, second.id)
    turns = rig.settled(chat)
    assert [turn.id for turn in turns[:3]] == [one.id, first.id, two.id]
    assert turns[3].id > second.id
    rig.sessions.edit(chat, one.id, "other !code")
    turns = rig.settled(chat)
    assert [turn.content for turn in turns][0] == "other !code"
    assert len(turns) == 2
    assert "```python" in turns[1].content
    with pytest.raises(RequestError):
        rig.sessions.retry(chat, second.id)
    with pytest.raises(RequestError):
        rig.sessions.edit(chat, one.id, " ")
    assert rig.settled(chat) == turns


def test_the_engine_sees_the_system_prompt_and_every_turn_with_text(
    stepped: tuple[Rig, SteppedEngine],
) -> None:
    rig, engine = stepped
    rig.settings.update(system_prompt="Be brief.", sampling={"max_new_tokens": 9, "seed": 4})
    chat = rig.sessions.send(None, "one")
    engine.stream(chat, 1).say("hm", thinking=True)
    engine.stream(chat, 1).fed.put(EngineDiedError("gone"))
    rig.settled(chat)
    rig.sessions.send(chat, "two")
    engine.stream(chat, 2).say("answer")
    engine.stream(chat, 2).finish("length")
    assert rig.settled(chat)[-1].stats["finish_reason"] == "length"
    rig.sessions.send(chat, "three")
    engine.stream(chat, 3).finish()
    rig.settled(chat)
    assert engine.prompts[2] == [
        Message("system", "Be brief."),
        Message("user", "one\n\ntwo"),
        Message("assistant", "answer"),
        Message("user", "three"),
    ]
    assert engine.params[2] == SamplingParams(max_new_tokens=9, seed=4)


def test_deleting_a_chat_ends_its_answer(stepped: tuple[Rig, SteppedEngine]) -> None:
    rig, engine = stepped
    chat = rig.sessions.send(None, "secret")
    stream = engine.stream(chat, 1)
    stream.say("more secret")
    rig.until(chat, lambda view: live_text(view) == "more secret")
    rig.sessions.delete(chat)
    assert stream.closed.wait(SOON_S)
    assert rig.sessions.view(chat) == ConversationView(chat, "", [])
    assert rig.sessions.conversations() == []
    assert rig.sessions.answering() == 0
    with pytest.raises(RequestError, match="deleted"):
        rig.sessions.send(chat, "still there?")


def test_titles_are_the_first_line_cut_at_a_word(rig: Rig) -> None:
    long = "word " * 40
    chat = rig.sessions.send(None, long)
    title = rig.sessions.view(chat).title
    assert title.endswith("word\u2026")
    assert len(title) <= 61
    other = rig.sessions.create()
    rig.sessions.rename(other, "Mine")
    rig.sessions.send(other, "hello")
    rig.settled(chat)
    rig.settled(other)
    assert rig.sessions.view(other).title == "Mine"
    rig.sessions.rename(other, "  ")
    assert rig.sessions.view(other).title == "Mine"
