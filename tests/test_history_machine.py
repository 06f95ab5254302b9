"""The chats on disk equal a dict beside them, whatever is done to them in any order."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from app.history import INTERRUPTED, History, StoredMessage
from runtime.errors import RequestError

# Thousands of durable writes: on a disk in memory, where there is one, they cost nothing.
QUICK_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
WORDS = ("alpha", "Beta", "gam%ma", "de_lta", 'quo"te', "naïve", "日本語テキスト", "x", "OR", "\\n")
texts = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join) | st.text(max_size=20)


def cleaned(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


class HistoryMachine(RuleBasedStateMachine):
    """A dict beside the file; whatever happens, both tell the same chats (SM5)."""

    chats = Bundle("chats")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=QUICK_DISK))
        self.now = 0.0
        self.history = self.open()
        self.model: dict[str, dict[str, Any]] = {}

    def open(self) -> History:
        return History(self.folder, clock=self.tick)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def answers(self, chat: str) -> list[dict[str, Any]]:
        turns = self.model.get(chat, {"turns": []})["turns"]
        return [turn for turn in turns if turn["role"] == "assistant"]

    @rule(target=chats, title=texts)
    def create(self, title: str) -> str:
        chat = self.history.create(title)
        self.model[chat] = {"title": cleaned(title), "turns": [], "updated": self.now}
        return chat

    @rule(chat=chats, title=texts)
    def rename(self, chat: str, title: str) -> None:
        self.history.rename(chat, title)
        if chat in self.model:
            self.model[chat]["title"] = cleaned(title)

    @rule(chat=consumes(chats))
    def delete(self, chat: str) -> None:
        self.history.delete(chat)
        self.model.pop(chat, None)

    @rule(chat=chats, text=texts)
    def ask(self, chat: str, text: str) -> None:
        asked, answer = self.history.ask(chat, text)
        turns = self.model[chat]["turns"]
        assert asked < answer
        assert not turns or turns[-1]["id"] < asked
        turns.append(turn(asked, "user", cleaned(text), "complete"))
        turns.append(turn(answer, "assistant", "", "partial"))
        self.model[chat]["updated"] = self.now - 2

    @rule(chat=chats, data=st.data(), text=st.none() | texts)
    def ask_again(self, chat: str, data: st.DataObject, text: str | None) -> None:
        turns = self.model[chat]["turns"]
        if not turns:
            with pytest.raises(RequestError):
                self.history.ask_again(chat, 10**9, text)
            return
        at = data.draw(st.integers(0, len(turns) - 1))
        answer = self.history.ask_again(chat, turns[at]["id"], text)
        at -= turns[at]["role"] == "assistant"
        if text is not None:
            turns[at]["content"] = cleaned(text)
        turns[at + 1 :] = [turn(answer, "assistant", "", "partial")]
        self.model[chat]["updated"] = self.now - 1

    @rule(
        chat=chats,
        text=texts,
        thought=texts,
        state=st.sampled_from(("partial", "complete", "stopped", "failed")),
        stats=st.dictionaries(st.sampled_from(("new_tokens", "hit_rate")), st.integers(0, 9)),
    )
    def save(self, chat: str, text: str, thought: str, state: Any, stats: Any) -> None:
        if self.answers(chat):
            last = self.answers(chat)[-1]
            self.history.save_answer(last["id"], text, thought, state, stats, "why")
            last.update(
                content=cleaned(text),
                reasoning=cleaned(thought),
                state=state,
                stats=stats,
                error="why",
            )

    @rule(text=texts)
    def save_of_a_deleted_answer(self, text: str) -> None:
        self.history.save_answer(10**9, text)

    @rule()
    def reopen(self) -> None:
        self.history.close()
        self.history = self.open()
        assert self.history.notices == []
        for chat in self.model:
            for answer in self.answers(chat):
                if answer["state"] == "partial":
                    answer.update(state="failed", error=INTERRUPTED)

    @rule(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=2))
    def search(self, words: list[str]) -> None:
        found = {chat.id for chat in self.history.conversations(" ".join(words))}
        settled = {
            chat
            for chat, kept in self.model.items()
            for text in [
                kept["title"],
                *(t["content"] for t in kept["turns"] if t["state"] != "partial"),
            ]
            if all(word.lower() in text.lower() for word in words)
        }
        being_written = {
            chat for chat in self.model if any(a["state"] == "partial" for a in self.answers(chat))
        }
        assert found - being_written == settled - being_written

    @invariant()
    def same_list(self) -> None:
        listed = [(c.id, c.title, c.updated_s) for c in self.history.conversations()]
        expected = [(id_, kept["title"], kept["updated"]) for id_, kept in self.model.items()]
        assert sorted(listed) == sorted(expected)
        assert [c[2] for c in listed] == sorted((c[2] for c in listed), reverse=True)

    @invariant()
    def same_turns(self) -> None:
        for chat, kept in self.model.items():
            assert [as_turn(m) for m in self.history.messages(chat)] == kept["turns"]

    def teardown(self) -> None:
        self.history.close()
        shutil.rmtree(self.folder)


def turn(id_: int, role: str, content: str, state: str) -> dict[str, Any]:
    return {
        "id": id_,
        "role": role,
        "content": content,
        "reasoning": "",
        "state": state,
        "stats": {},
        "error": "",
    }


def as_turn(message: StoredMessage) -> dict[str, Any]:
    return {key: getattr(message, key) for key in turn(0, "", "", "")}


TestHistoryMachine = HistoryMachine.TestCase
TestHistoryMachine.settings = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
