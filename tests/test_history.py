"""The chats on disk: equal to a dict in any order, durable under kill -9, gone when deleted."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from app.database import FILE_NAME, MIGRATIONS, HistoryError
from app.history import INTERRUPTED, UNTITLED, History, StoredMessage
from runtime.errors import RequestError

KILLS = 25
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


def test_an_answer_cut_short_is_kept_and_marked(tmp_path: Path) -> None:
    history = History(tmp_path)
    chat = history.create()
    _, answer = history.ask(chat, "why?")
    history.save_answer(answer, "Because")
    history.close()
    history = reopened(tmp_path)
    last = history.messages(chat)[-1]
    history.close()
    assert (last.content, last.state, last.error) == ("Because", "failed", INTERRUPTED)


def test_a_second_app_is_refused_by_name(tmp_path: Path) -> None:
    first = History(tmp_path)
    first.create("kept")
    with pytest.raises(HistoryError, match="in use by another PreScope"):
        History(tmp_path)
    first.close()
    second = History(tmp_path)
    assert [chat.title for chat in second.conversations()] == ["kept"]
    second.close()


def test_use_after_close_and_closing_twice(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.close()
    history.close()
    with pytest.raises(HistoryError, match="closed"):
        history.conversations()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
def test_only_this_user_can_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    history = History(folder)
    history.ask(history.create(), "private")
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    history.close()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HistoryError, match="cannot be written"):
        History(tmp_path / "chats")


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "chats").write_text("")
    with pytest.raises(HistoryError, match="cannot be written"):
        History(tmp_path / "chats")


def v2_adds_stars(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE conversations ADD COLUMN stars INTEGER NOT NULL DEFAULT 3")


def v3_fails_half_way(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE half (done)")
    db.execute("DELETE FROM conversations")
    raise sqlite3.OperationalError("planned")


def test_migrations_run_once_and_keep_the_chats(tmp_path: Path) -> None:
    chat = filled(tmp_path, "first version")
    later = History(tmp_path, migrations=(*MIGRATIONS, v2_adds_stars))
    assert later.title(chat) == "first version"
    later.close()
    again = History(tmp_path, migrations=(*MIGRATIONS, v2_adds_stars))
    assert len(again.messages(chat)) == 2
    again.close()
    assert query(tmp_path, "SELECT stars FROM conversations") == [(3,)]
    assert query(tmp_path, "PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    chat = filled(tmp_path, "still here")
    with pytest.raises(HistoryError, match="planned"):
        History(tmp_path, migrations=(*MIGRATIONS, v2_adds_stars, v3_fails_half_way))
    history = reopened(tmp_path)
    assert history.title(chat) == "still here"
    history.close()
    assert query(tmp_path, "PRAGMA user_version") == [(len(MIGRATIONS),)]


def test_chats_of_a_newer_version_are_left_alone(tmp_path: Path) -> None:
    filled(tmp_path, "from the future")
    newer = len(MIGRATIONS) + 1
    query(tmp_path, f"PRAGMA user_version = {newer}")
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(HistoryError, match=rf"version {newer}.*version {len(MIGRATIONS)}") as error:
        History(tmp_path)
    assert "Update PreScope" in error.value.next_step
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("damage", ["text", "header", "middle"])
def test_a_damaged_file_is_moved_aside_whole(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, "lost, but not deleted")
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    if damage == "text":
        content = bytearray(b"this was never a database\n" * 100)
    elif damage == "header":
        content[:16] = b"SQLite format 9\x00"
    else:
        content[4096:] = bytes(random.Random(1).randbytes(len(content) - 4096))
    path.write_bytes(content)
    history = History(tmp_path)
    assert history.conversations() == []
    kept = next(tmp_path.glob(f"{FILE_NAME}.damaged-*"))
    assert kept.read_bytes() == bytes(content)
    assert str(kept) in history.notices[0]
    chat = history.create("fresh")
    history.close()
    history = reopened(tmp_path)
    assert history.title(chat) == "fresh"
    history.close()


def test_what_a_damaged_file_still_tells_is_saved(tmp_path: Path) -> None:
    """One page in the middle is overwritten: the turns before and after it come back."""
    history = History(tmp_path)
    chats = [history.create(f"chat {number}") for number in range(30)]
    for chat in chats:
        _, answer = history.ask(chat, "question " + "long " * 400)
        history.save_answer(answer, "answer " + "long " * 400, state="complete")
    history.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    middle = content.index(b"answer long", len(content) // 3) // 4096 * 4096
    content[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    history = History(tmp_path)
    saved = sum(len(history.messages(chat)) for chat in chats)
    assert 30 <= saved < 60
    assert f"{saved} messages" in history.notices[0]
    assert {chat.title for chat in history.conversations()} == {f"chat {n}" for n in range(30)}
    assert len(history.messages(chats[0])) == len(history.messages(chats[-1])) == 2
    found = history.conversations("question")
    assert len(found) >= 15
    history.close()
    assert query(tmp_path, "PRAGMA integrity_check") == [("ok",)]
    assert query(tmp_path, "PRAGMA foreign_key_check") == []


@pytest.mark.parametrize("indexed", [True, False])
def test_deleted_text_is_in_no_file(tmp_path: Path, indexed: bool) -> None:
    history = History(tmp_path, use_search_index=indexed)
    kept = history.create("kept")
    history.ask(kept, "this stays")
    doomed = history.create("title-marker-7f3a")
    for number in range(40):
        _, answer = history.ask(doomed, f"question-marker-7f3a {number} " + "long text " * 300)
        history.save_answer(answer, "partial-marker-7f3a")
        history.save_answer(
            answer, "answer-marker-7f3a", "thought-marker-7f3a", "failed", {}, "error-marker-7f3a"
        )
    history.ask_again(doomed, history.messages(doomed)[0].id, "edited-marker-7f3a")
    assert b"marker-7f3a" in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    history.delete(doomed)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [name for name, content in left.items() if b"marker-7f3a" in content] == []
    assert b"this stays" in b"".join(left.values())
    if indexed:  # it holds three letters at a time, of which none of the marker's may be left
        assert all(b"7f3" not in content for content in left.values())
    history.close()


def test_a_little_deleted_text_among_much_is_gone_too(tmp_path: Path) -> None:
    """Too little to be worth writing the file anew: freed pages and cells are zeroed instead."""
    history = History(tmp_path)
    kept, doomed = history.create("kept"), history.create("doomed")
    for number in range(60):
        history.ask(kept, f"kept {number} " + "filler " * 400)
        if number % 20 == 0:
            history.ask(doomed, "small-marker-7f3a")
            history.ask(doomed, "large-marker-7f3a " * 500)
    history.delete(doomed)
    assert [p.name for p in tmp_path.iterdir() if b"marker-7f3a" in p.read_bytes()] == []
    assert len(history.messages(kept)) == 120
    history.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_search_forgets_what_was_edited_away(tmp_path: Path, indexed: bool) -> None:
    history = History(tmp_path, use_search_index=indexed)
    chat = history.create()
    asked, answer = history.ask(chat, "banana question")
    history.save_answer(answer, "banana answer", state="complete")
    again = history.ask_again(chat, asked, "cherry question")
    history.save_answer(again, "cherry answer", state="complete")
    history.save_answer(again, "melon answer", state="complete")
    assert history.conversations("banana") == history.conversations("cherry answer") == []
    assert [found.id for found in history.conversations("cherry question")] == [chat]
    assert [found.id for found in history.conversations("melon")] == [chat]
    history.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_search_finds_words_in_titles_and_turns(tmp_path: Path, indexed: bool) -> None:
    history = History(tmp_path, use_search_index=indexed)
    one, two = history.create("Cache sizes"), history.create(UNTITLED)
    _, answer = history.ask(two, 'what is a "slot_table" at 100%?')
    history.save_answer(answer, "A slot holds one expert.", state="complete")

    def found(words: str) -> list[str]:
        return [chat.id for chat in history.conversations(words)]

    assert found("cache") == [one]
    assert found("SLOT expert") == [two]
    assert found("slot_table") == found("100%") == found('"slot') == [two]
    assert found("slotstable") == found("10_%") == found("a_slot") == []
    assert found("cache slot") == []
    assert found("NEAR( *") == []
    assert found("  ") == [two, one]
    history.close()


def test_the_search_index_catches_up_after_a_time_without(tmp_path: Path) -> None:
    filled(tmp_path, "one", "words before")
    plain = History(tmp_path, use_search_index=False)
    chat = plain.create("two")
    plain.ask(chat, "words written meanwhile")
    plain.close()
    history = History(tmp_path)
    assert [found.id for found in history.conversations("meanwhile")] == [chat]
    assert len(history.conversations("words")) == 2
    history.close()


def test_a_damaged_index_costs_no_message_and_is_built_again(tmp_path: Path) -> None:
    filled(tmp_path, "one", "words before")
    query(tmp_path, "UPDATE message_words_data SET block = x'00ff00ff00ff' WHERE id > 9")
    query(tmp_path, "UPDATE message_words_data SET block = zeroblob(4) WHERE id = 10")
    history = History(tmp_path)
    chat = history.create("two")
    for _ in range(2):  # the first attempt finds the damage, the second does without the index
        with contextlib.suppress(HistoryError):
            history.delete(history.conversations("one")[0].id)
            break
    history.ask(chat, "words after")
    assert [found.id for found in history.conversations("words")] == [chat]
    history.close()
    history = reopened(tmp_path)
    assert [found.id for found in history.conversations("words aft")] == [chat]
    assert history._indexed
    history.close()


def test_lists_and_chats_are_read_in_index_order(tmp_path: Path) -> None:
    """The work does not grow with the number of chats: no sort, no scan."""
    history = History(tmp_path)
    db = history._db
    assert db is not None
    steps = "EXPLAIN QUERY PLAN SELECT id, title FROM conversations ORDER BY updated_s DESC LIMIT 9"
    assert "conversations_by_time" in str(db.execute(steps).fetchall())
    turns = "EXPLAIN QUERY PLAN SELECT id FROM messages WHERE conversation_id = 'x' ORDER BY id"
    plan = str(db.execute(turns).fetchall())
    assert "messages_by_conversation" in plan
    assert "TEMP B-TREE" not in plan
    history.close()


WRITER = """
import sys
from pathlib import Path
from app.history import History
history = History(Path(sys.argv[1]))
number = 0

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + chr(10))
    sys.stdout.flush()

while True:
    chat = history.create(f"chat {number}")
    asked, answer = history.ask(chat, f"question {number}")
    say("asked", chat, number)
    history.save_answer(answer, f"half {number}")
    say("half", chat, number)
    history.save_answer(answer, f"whole {number}", "thought", "complete", {"new_tokens": number})
    say("whole", chat, number)
    if number % 3 == 2:
        history.delete(chat)
        say("deleted", chat, number)
    number += 1
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """The writer says what is stored; it is killed at a random moment; nothing said is missing."""
    chance = random.Random(20261121)
    acknowledged: dict[str, tuple[str, int]] = {}
    doubtful: set[str] = set()
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.1))
        writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        lines = (first + writer.stdout.read()).split("\n")[:-1]  # a cut line says nothing
        writer.stdout.close()
        writer.wait()
        for line in lines:
            what, chat, said = line.split()
            acknowledged[chat] = (what, int(said))
        doubtful.add(lines[-1].split()[1])  # its next step may or may not have happened
        history = reopened(tmp_path)
        for chat, (what, number) in acknowledged.items():
            turns = history.messages(chat)
            if what == "deleted" or (chat in doubtful and number % 3 == 2 and not turns):
                assert turns == []
                continue
            assert [turn.role for turn in turns] == ["user", "assistant"], (what, number)
            assert turns[0].content == f"question {number}"
            wanted = {
                "asked": {"", f"half {number}"},
                "half": {f"half {number}", f"whole {number}"},
                "whole": {f"whole {number}"},
            }[what]
            assert turns[1].content in wanted
            if what == "whole":
                assert turns[1].state == "complete"
                assert turns[1].stats == {"new_tokens": number}
        history.close()
        assert query(tmp_path, "PRAGMA integrity_check") == [("ok",)]
        assert query(tmp_path, "PRAGMA foreign_key_check") == []
        acknowledged = {chat: seen for chat, seen in acknowledged.items() if seen[0] != "deleted"}
    assert len(acknowledged) > KILLS


def test_a_log_cut_by_power_loss_leaves_a_prefix(tmp_path: Path) -> None:
    """The log is cut at many places; what opens is always the first so many messages, whole."""
    history = History(tmp_path / "live", use_search_index=False)
    chat = history.create("cut")
    query_checkpoint(history)
    asked = [history.ask(chat, f"question {number}")[0] for number in range(8)]
    main = (tmp_path / "live" / FILE_NAME).read_bytes()
    log = (tmp_path / "live" / f"{FILE_NAME}-wal").read_bytes()
    history.close()
    seen = set()
    for length in (*range(0, len(log), 1531), len(log)):
        folder = tmp_path / "cut"
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(main)
        (folder / f"{FILE_NAME}-wal").write_bytes(log[:length])
        db = sqlite3.connect(folder / FILE_NAME)
        found = [row[0] for row in db.execute("SELECT id FROM messages WHERE role = 'user'")]
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        db.close()
        assert found == asked[: len(found)]
        seen.add(len(found))
        shutil.rmtree(folder)
    assert seen == set(range(9))


def query_checkpoint(history: History) -> None:
    db = history._db
    assert db is not None
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def filled(folder: Path, title: str, text: str = "question") -> str:
    history = History(folder)
    chat = history.create(title)
    _, answer = history.ask(chat, text)
    history.save_answer(answer, "answer", state="complete")
    history.close()
    return chat


def reopened(folder: Path) -> History:
    history = History(folder)
    assert history.notices == []
    return history


def query(folder: Path, statement: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(folder / FILE_NAME)
    found = db.execute(statement).fetchall()
    db.commit()
    db.close()
    return found
