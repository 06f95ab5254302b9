"""Opening the chats file: its schema, its migrations, and what to do when it is damaged.

`open_database` returns the one connection, locked exclusively until it is closed. A file of a
newer schema is refused untouched; a damaged one is moved aside, never deleted.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import PreScopeError

APPLICATION_ID = 0x50537065
FILE_NAME = "history.sqlite3"


class HistoryError(PreScopeError):
    """The chats on disk cannot be read or written."""


Migration = Callable[[sqlite3.Connection], None]


def _v1_conversations_and_messages(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE conversations (id TEXT PRIMARY KEY, title TEXT NOT NULL,"
        " created_s REAL NOT NULL, updated_s REAL NOT NULL) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX conversations_by_time ON conversations (updated_s DESC)")
    db.execute(
        "CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT,"
        " conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,"
        " role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),"
        " state TEXT NOT NULL CHECK (state IN ('complete', 'partial', 'stopped', 'failed')),"
        " content TEXT NOT NULL, reasoning TEXT NOT NULL DEFAULT '',"
        " stats TEXT NOT NULL DEFAULT '{}', error TEXT NOT NULL DEFAULT '',"
        " created_s REAL NOT NULL)"
    )
    db.execute("CREATE INDEX messages_by_conversation ON messages (conversation_id, id)")
    db.execute("CREATE TABLE search_index (stale INTEGER NOT NULL)")
    db.execute("INSERT INTO search_index VALUES (1)")


MIGRATIONS: tuple[Migration, ...] = (_v1_conversations_and_messages,)


def open_database(
    folder: Path, migrations: Sequence[Migration] = MIGRATIONS
) -> tuple[sqlite3.Connection, list[str]]:
    """Return the connection and what a person should know about how the file was found.

    Raises:
        HistoryError: the file is of a newer schema, in use, or its folder cannot be written.
    """
    path = folder / FILE_NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise HistoryError(
            f"The folder for chats cannot be written: {folder} ({error.strerror}).",
            "Choose another data folder with --data-dir, or free the disk.",
        ) from error
    notices: list[str] = []
    try:
        return _open_sound(path, migrations), notices
    except sqlite3.OperationalError as error:
        raise _unavailable(path, error) from error
    except sqlite3.DatabaseError as error:
        kept = _move_aside(path)
        damage = str(error)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    db = _open_sound(path, migrations)
    saved = _salvage(kept, db)
    notices.append(
        f"The file of chats was damaged ({damage}). It was kept as {kept}; a new one was started"
        f" with the {saved} messages that could still be read."
    )
    return db, notices


def _open_sound(path: Path, migrations: Sequence[Migration]) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(migrations):
            raise HistoryError(
                f"The chats in {path} have schema version {version}, written by a newer PreScope;"
                f" this one knows version {len(migrations)}. Nothing was changed.",
                "Update PreScope, or start it with another --data-dir.",
            )
        found = [row[0] for row in db.execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise sqlite3.DatabaseError("; ".join(str(line) for line in found))
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "temp_store = MEMORY",
            "foreign_keys = ON",
        ):
            db.execute(f"PRAGMA {pragma}")
        db.execute("BEGIN IMMEDIATE")
        for number in range(version, len(migrations)):
            migrations[number](db)
        db.execute(f"PRAGMA user_version = {len(migrations)}")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _unavailable(path: Path, error: sqlite3.Error) -> HistoryError:
    if "locked" in str(error):
        return HistoryError(
            f"The chats in {path} are in use by another PreScope.",
            "Use the window that is already open, or close it and start again.",
        )
    return HistoryError(
        f"The chats in {path} cannot be opened: {error}.",
        "Check that the disk is not full and that the folder can be written.",
    )


def _salvage(kept: Path, db: sqlite3.Connection) -> int:
    """Copy what a damaged file still tells into a new one; return the number of messages."""
    has_log = kept.with_name(kept.name + "-wal").exists()
    how = "mode=ro" if has_log else "mode=ro&immutable=1"
    try:
        old = sqlite3.connect(f"{kept.absolute().as_uri()}?{how}", uri=True, timeout=0.0)
    except sqlite3.Error:
        return 0
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("PRAGMA defer_foreign_keys = ON")
        for table, key in (("conversations", "id"), ("messages", "id")):
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            names = ", ".join(columns)
            # A bad page ends a scan, so the far side of it is read from the other end.
            for order in ("ASC", "DESC"):
                _copy_rows(
                    old,
                    f"SELECT {names} FROM {table} ORDER BY {key} {order}",
                    db,
                    f"INSERT OR IGNORE INTO {table} ({names})"
                    f" VALUES ({', '.join('?' * len(columns))})",
                )
        db.execute(
            "INSERT INTO conversations SELECT DISTINCT conversation_id, 'Recovered chat',"
            " created_s, created_s FROM messages WHERE conversation_id NOT IN"
            " (SELECT id FROM conversations) GROUP BY conversation_id"
        )
        saved = int(db.execute("SELECT count(*) FROM messages").fetchone()[0])
        db.execute("COMMIT")
    finally:
        old.close()
        if db.in_transaction:
            db.execute("ROLLBACK")
    return saved


def _copy_rows(old: sqlite3.Connection, select: str, db: sqlite3.Connection, insert: str) -> None:
    """Copy rows until the first one that cannot be read; one that does not fit is left out."""
    with contextlib.suppress(sqlite3.DatabaseError, OverflowError, UnicodeDecodeError):
        for row in old.execute(select):
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(insert, row)


def _move_aside(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while (kept := path.with_name(f"{path.name}.damaged-{stamp}-{number}")).exists():
        number += 1
    path.rename(kept)
    for suffix in ("-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    return kept
