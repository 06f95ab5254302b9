"""Tabs, reloads, restarts and a moody engine in any order: what a tab saw is what is stored."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.errors import BusyError, EngineDiedError
from tests.chat_rigs import Rig, SteppedEngine, live_text

# Thousands of durable writes: on a disk in memory, where there is one, they cost nothing.
QUICK_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class SessionMachine(RuleBasedStateMachine):
    """Tabs, reloads, restarts and a moody engine: what a tab saw is what is stored (SM6)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=QUICK_DISK))
        self.engine = SteppedEngine()
        self.rig = Rig(self.folder, self.engine)
        self.chat = self.rig.sessions.create()
        self.questions = 0
        self.said = ""
        self.running = False
        self.tabs: list[list[str]] = [[], [], []]

    @precondition(lambda self: not self.running)
    @rule(again=st.booleans())
    def ask(self, again: bool) -> None:
        turns = self.rig.sessions.view(self.chat).messages
        if again and turns:
            self.rig.sessions.retry(self.chat, turns[-1].id)
        else:
            self.rig.sessions.send(self.chat, f"question {self.questions}")
        self.questions += 1
        self.said, self.running, self.tabs = "", True, [[], [], []]

    @precondition(lambda self: self.running)
    @rule()
    def ask_twice(self) -> None:
        with pytest.raises(BusyError):
            self.rig.sessions.send(self.chat, "again")

    @precondition(lambda self: self.running)
    @rule(text=st.sampled_from(("a", "bc", "é\n", "   ")))
    def say(self, text: str) -> None:
        self.engine.stream(self.chat, self.questions).say(text)
        self.said += text
        self.rig.until(self.chat, lambda view: live_text(view) == self.said)

    @rule(tab=st.integers(0, 2))
    def look(self, tab: int) -> None:
        view = self.rig.sessions.view(self.chat)
        if view.live is not None:
            self.tabs[tab].append(view.live.text)

    @precondition(lambda self: self.running)
    @rule(how=st.sampled_from(("finish", "die", "stop", "restart")))
    def end(self, how: str) -> None:
        stream = self.engine.stream(self.chat, self.questions)
        if how == "finish":
            stream.finish()
        elif how == "die":
            stream.fed.put(EngineDiedError("gone"))
        elif how == "stop":
            self.rig.sessions.stop(self.chat)
        else:
            self.rig.close()
            self.rig.open()
        last = self.rig.settled(self.chat)[-1]
        self.running = False
        wanted = {"finish": "complete", "stop": "stopped"}.get(how, "failed")
        assert (last.content, last.state) == (self.said, wanted)
        for seen in self.tabs:
            assert all(last.content.startswith(text) for text in seen)
            assert seen == sorted(seen, key=len)

    @invariant()
    def turns_alternate(self) -> None:
        view = self.rig.sessions.view(self.chat)
        roles = [turn.role for turn in view.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert (view.live is not None) == self.running == (len(roles) % 2 == 1)
        stored = self.rig.history.messages(self.chat)
        assert len(stored) == len(roles) + self.running

    def teardown(self) -> None:
        self.rig.close()
        shutil.rmtree(self.folder)


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
