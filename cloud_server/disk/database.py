"""An SQLite file of this program: how it is opened, and brought to the schema that this program knows."""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UsageError


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, made if need be, for any thread, one at a time.

    Rows are dicts, and transactions are begun by hand.

    Raises:
        sqlite3.DatabaseError: the file cannot be used.
    """
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.row_factory = _as_dict
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    # What is forgotten is not to be found in free pages.
    database.execute("PRAGMA secure_delete = ON")
    return database


def version(database: sqlite3.Connection) -> int:
    """Return how many migrations the database has been through."""
    found: int = database.execute("PRAGMA user_version").fetchone()["user_version"]
    return found


def migrate(database: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Bring the database to the last version, each step in a transaction.

    Args:
        migrations: SQL, from one version to the next. Never edit one, add another.

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
    """Have the write-ahead log forget what was deleted; where the disk does not let it, the next time."""
    with suppress(sqlite3.OperationalError):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _as_dict(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}
