"""Finding words in the chats: SQLite's full-text index where it works, plain comparison elsewhere.

The index holds three letters at a time, so both ways find the same thing: a text that contains
every word. It is only ever a copy: when in doubt it is left alone and built again at the next
start.
"""

from __future__ import annotations

import contextlib
import sqlite3

_SHORTEST_INDEXED = 3
_FORGET = (
    "INSERT INTO message_words (message_words, rowid, content)"
    " VALUES ('delete', old.id, old.content);"
)
_LEARN = "INSERT INTO message_words (rowid, content) VALUES (new.id, new.content);"
_TRIGGERS = {
    "message_added": ("INSERT ON main.messages WHEN new.state <> 'partial'", _LEARN),
    "message_removed": ("DELETE ON main.messages WHEN old.state <> 'partial'", _FORGET),
    "message_left": ("UPDATE ON main.messages WHEN old.state <> 'partial'", _FORGET),
    "message_came": ("UPDATE ON main.messages WHEN new.state <> 'partial'", _LEARN),
}


def open_index(db: sqlite3.Connection) -> bool:
    """Set up full-text search on this connection; False where SQLite cannot do it.

    The index is kept by temporary triggers, so an SQLite without FTS5 can still write the same
    file: it marks the index stale, and the next one that can rebuilds it. A partial answer is
    indexed when it ends.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "CREATE VIEW IF NOT EXISTS settled_messages AS"
            " SELECT id, content FROM messages WHERE state <> 'partial'"
        )
        db.execute(
            "CREATE VIRTUAL TABLE IF NOT EXISTS message_words USING"
            " fts5(content, content='settled_messages', content_rowid='id', tokenize='trigram')"
        )
        if db.execute("SELECT stale FROM search_index").fetchone()[0]:
            db.execute("INSERT INTO message_words (message_words) VALUES ('rebuild')")
        for name, (moment, body) in _TRIGGERS.items():
            db.execute(f"CREATE TEMP TRIGGER {name} AFTER {moment} BEGIN {body} END")
        db.execute("UPDATE search_index SET stale = 0")
        db.execute("COMMIT")
    except sqlite3.DatabaseError:
        if db.in_transaction:
            db.execute("ROLLBACK")
        return False
    return True


def distrust_index(db: sqlite3.Connection) -> None:
    """Do without the index from here on, and have it built again at the next start."""
    with contextlib.suppress(sqlite3.Error):
        for name in _TRIGGERS:
            db.execute(f"DROP TRIGGER IF EXISTS temp.{name}")
        db.execute("UPDATE search_index SET stale = 1")


def matching(words: list[str], indexed: bool) -> tuple[str, list[str]]:
    """Return an SQL condition on `conversations`, and its values: every word, without case.

    All words are in the title or all in one message. Outside the index, only the case of ASCII
    letters is ignored.
    """
    patterns = [f"%{_escape_like(word)}%" for word in words]
    title = " AND ".join(["title LIKE ? ESCAPE '\\'"] * len(words))
    if indexed and min(map(len, words)) >= _SHORTEST_INDEXED:
        quoted = " ".join('"' + word.replace('"', '""') + '"' for word in words)
        inside = "id IN (SELECT rowid FROM message_words WHERE message_words MATCH ?)"
        values = [quoted]
    else:
        inside, values = " AND ".join(["content LIKE ? ESCAPE '\\'"] * len(words)), patterns
    found = f"id IN (SELECT conversation_id FROM messages WHERE {inside})"
    return f"({title}) OR {found}", [*patterns, *values]


def _escape_like(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
