"""Chats after kill -9, power loss, damage and new versions: what was stored is kept or told of."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.database import FILE_NAME, MIGRATIONS, HistoryError
from app.history import INTERRUPTED, History

KILLS = 25


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
