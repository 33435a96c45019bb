"""The opening of an SQLite file, and its migration to the schema that this program knows."""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ecavg.common.errors import UsageError


def connect(path: Path) -> sqlite3.Connection:
    """Open a database file, which is made if it does not exist.

    Any thread may use the connection, but only one at a time. Rows are dicts. Each statement is committed at
    once, unless the caller begins a transaction.

    Raises:
        sqlite3.DatabaseError: the file cannot be used.
    """
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.row_factory = _as_dict
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    # Deleted rows of a forgotten agent must not survive in the free pages of the file.
    database.execute("PRAGMA secure_delete = ON")
    return database


def version(database: sqlite3.Connection) -> int:
    """Return how many migrations the database has been through."""
    found: int = database.execute("PRAGMA user_version").fetchone()["user_version"]
    return found


def migrate(database: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Migrate the database to the last version, each step in one transaction.

    Args:
        database: the connection to the file.
        path: the path of the file, for the message of an error.
        migrations: the SQL statements of each step. A step is never edited; another step is added.

    Raises:
        UsageError: a newer program has written the database.
        sqlite3.DatabaseError: the file cannot be used.
    """
    known = version(database)
    if known > len(migrations):
        raise UsageError(
            f"{path} has schema version {known}, this program knows up to {len(migrations)}:"
            " use a newer cloud-server, or choose another --state-dir"
        )
    for number, statements in enumerate(migrations[known:], start=known + 1):
        with database:
            database.executescript(f"BEGIN IMMEDIATE; {statements}; PRAGMA user_version = {number};")


def empty_log(database: sqlite3.Connection) -> None:
    """Empty the write-ahead log, which may still contain deleted rows.

    If the disk does not allow that now, the log is emptied by a later call.
    """
    with suppress(sqlite3.OperationalError):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _as_dict(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}
