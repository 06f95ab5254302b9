"""The chats on disk: private, found by their words, read in order, and gone when deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.database import HistoryError
from app.history import UNTITLED, History


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
