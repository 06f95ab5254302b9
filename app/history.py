"""The chats on disk: one SQLite file, one connection, one lock.

`History` is the only object that touches the file. What a method returned is durable: it survives
`kill -9` and power loss (`synchronous=FULL`). The connection holds an exclusive file lock, so a
second copy of the app is refused by name, and write-ahead logging is safe even with a SQLite older
than 3.51.3, whose log reset could damage a file that two connections write.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.database import MIGRATIONS, HistoryError, Migration, open_database
from app.search import distrust_index, matching, open_index
from runtime.errors import RequestError

Role = Literal["user", "assistant"]
MessageState = Literal["complete", "partial", "stopped", "failed"]
INTERRUPTED = "PreScope was closed while this answer was being written. Retry to ask again."
UNTITLED = "New chat"
_COLUMNS = "id, conversation_id, role, content, reasoning, state, stats, error, created_s"


@dataclass(frozen=True)
class ConversationSummary:
    """One line of the sidebar. `updated_s` is seconds since 1970."""

    id: str
    title: str
    updated_s: float
    created_s: float = 0.0


@dataclass(frozen=True)
class StoredMessage:
    """One turn on disk. `id` grows within a conversation and is never used twice.

    `stats` is the record of `runtime.core.GenerationStats` plus `finish_reason`, empty until the
    answer ends; `error` is the sentence for a person when `state` is "failed".
    """

    id: int
    conversation_id: str
    role: Role
    content: str
    reasoning: str = ""
    state: MessageState = "complete"
    stats: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    created_s: float = 0.0


class History:
    """Owns the connection; every method may be called from any thread. `close` once."""

    def __init__(
        self,
        folder: Path,
        *,
        migrations: Sequence[Migration] = MIGRATIONS,
        clock: Callable[[], float] = time.time,
        use_search_index: bool = True,
    ) -> None:
        """Open or create the chats in `folder`; answers cut short by the last end are marked.

        Raises:
            HistoryError: the file is of a newer schema, in use, or cannot be written.
        """
        self._lock = threading.Lock()
        self._clock = clock
        self.path = folder
        db, self.notices = open_database(folder, migrations)
        self._db: sqlite3.Connection | None = db
        try:
            self._indexed = use_search_index and open_index(db)
            if not self._indexed:
                distrust_index(db)
            db.execute(
                "UPDATE messages SET state = 'failed', error = ? WHERE state = 'partial'",
                (INTERRUPTED,),
            )
        except BaseException:
            db.close()
            raise

    def conversations(self, query: str = "", limit: int = 500) -> list[ConversationSummary]:
        """Return the newest conversations first; with a query, those that contain every word.

        The words, compared without case, must all be in the title or all in one message.
        """
        words = _clean(query).split()
        where, values = matching(words, self._indexed) if words else ("1", [])
        with self._transaction() as db:
            rows = db.execute(
                "SELECT id, title, updated_s, created_s FROM conversations"
                f" WHERE {where} ORDER BY updated_s DESC, id LIMIT ?",
                [*values, limit],
            ).fetchall()
        return [ConversationSummary(*row) for row in rows]

    def title(self, conversation_id: str) -> str | None:
        """Return the title, or None when there is no such conversation."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT title FROM conversations WHERE id = ?", (conversation_id,)
            ).fetchone()
        return None if row is None else str(row[0])

    def create(self, title: str = UNTITLED) -> str:
        """Add an empty conversation and return its id."""
        conversation_id, now = secrets.token_hex(8), self._clock()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?)",
                (conversation_id, _clean(title), now, now),
            )
        return conversation_id

    def rename(self, conversation_id: str, title: str) -> None:
        """Set the title; does nothing when the conversation is gone."""
        with self._transaction() as db:
            db.execute(
                "UPDATE conversations SET title = ? WHERE id = ?", (_clean(title), conversation_id)
            )

    def delete(self, conversation_id: str) -> None:
        """Remove the conversation for good: no byte of its text stays in our files."""
        with self._transaction() as db:
            db.execute("DELETE FROM messages WHERE conversation_id = ?", (conversation_id,))
            db.execute("DELETE FROM conversations WHERE id = ?", (conversation_id,))
            if self._indexed:
                db.execute("INSERT INTO message_words (message_words) VALUES ('optimize')")
        with self._connection() as db:
            free, total = (
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("freelist_count", "page_count")
            )
            if free * 4 > total:
                db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def messages(self, conversation_id: str) -> list[StoredMessage]:
        """Return the turns in order; empty when the conversation is gone."""
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE conversation_id = ? ORDER BY id",
                (conversation_id,),
            ).fetchall()
        return [_message(row) for row in rows]

    def ask(self, conversation_id: str, text: str) -> tuple[int, int]:
        """Store a user message and the empty answer to come; return both ids.

        Raises:
            RequestError: the conversation is gone.
        """
        with self._transaction() as db:
            self._touch(db, conversation_id)
            asked = self._add(db, conversation_id, "user", text, "complete")
            return asked, self._add(db, conversation_id, "assistant", "", "partial")

    def ask_again(self, conversation_id: str, message_id: int, text: str | None = None) -> int:
        """Forget what follows a user message, start a new answer and return the answer's id.

        `message_id` is the user message, or an answer to it. `text` replaces the user message.

        Raises:
            RequestError: there is no such message.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT id FROM messages WHERE conversation_id = ? AND id <= ? AND role = 'user'"
                " AND EXISTS (SELECT 1 FROM messages WHERE conversation_id = ? AND id = ?)"
                " ORDER BY id DESC LIMIT 1",
                (conversation_id, message_id, conversation_id, message_id),
            ).fetchone()
            if row is None:
                raise RequestError(
                    "This message is no longer there.", "It was changed in another window: reload."
                )
            self._touch(db, conversation_id)
            db.execute(
                "DELETE FROM messages WHERE conversation_id = ? AND id > ?",
                (conversation_id, row[0]),
            )
            if text is not None:
                db.execute("UPDATE messages SET content = ? WHERE id = ?", (_clean(text), row[0]))
            return self._add(db, conversation_id, "assistant", "", "partial")

    def save_answer(
        self,
        message_id: int,
        content: str,
        reasoning: str = "",
        state: MessageState = "partial",
        stats: Mapping[str, Any] | None = None,
        error: str = "",
    ) -> None:
        """Store an answer as far as it is; does nothing when its conversation was deleted."""
        with self._transaction() as db:
            db.execute(
                "UPDATE messages SET content = ?, reasoning = ?, state = ?, stats = ?, error = ?"
                " WHERE id = ?",
                (
                    _clean(content),
                    _clean(reasoning),
                    state,
                    json.dumps(dict(stats or {})),
                    _clean(error),
                    message_id,
                ),
            )

    def close(self) -> None:
        """Fold the log into the file and let go of it; safe to call twice."""
        with self._lock:
            if self._db is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._db.close()
                self._db = None

    def _touch(self, db: sqlite3.Connection, conversation_id: str) -> None:
        done = db.execute(
            "UPDATE conversations SET updated_s = ? WHERE id = ?",
            (self._clock(), conversation_id),
        )
        if done.rowcount == 0:
            raise RequestError("This chat was deleted.", "Start a new chat.")

    def _add(
        self, db: sqlite3.Connection, conversation_id: str, role: Role, text: str, state: str
    ) -> int:
        done = db.execute(
            "INSERT INTO messages (conversation_id, role, content, state, created_s)"
            " VALUES (?, ?, ?, ?, ?)",
            (conversation_id, role, _clean(text), state, self._clock()),
        )
        return int(done.lastrowid or 0)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._db is None:
                raise HistoryError("The chats are closed.", "Start PreScope again.")
            try:
                yield self._db
            except sqlite3.Error as error:
                if self._indexed and not isinstance(error, sqlite3.OperationalError):
                    # Most likely the search index, which is no reason to lose a message.
                    self._indexed = False
                    distrust_index(self._db)
                raise HistoryError(
                    f"The chats in {self.path} could not be read or saved: {error}.",
                    "Check that the disk is not full; what is on the page is kept meanwhile.",
                ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")


def _message(row: tuple[Any, ...]) -> StoredMessage:
    id_, chat, role, content, reasoning, state, stats, error, created_s = row
    return StoredMessage(
        id_, chat, role, content, reasoning, state, json.loads(stats), error, created_s
    )


def _clean(text: str) -> str:
    """Return text that SQLite and UTF-8 can hold: no lone surrogates, no NUL."""
    return (
        text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\N{REPLACEMENT CHARACTER}")
    )
