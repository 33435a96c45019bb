"""An open state directory: its lock, its database and its blobs, and how records are written and read."""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from ecavg.cloud_server.disk.blobs import Blobs
from ecavg.cloud_server.disk.database import connect, empty_log, migrate, version
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.disk.lock import locked
from ecavg.cloud_server.disk.place import DEFAULT_CACHE_BYTES, open_blobs
from ecavg.cloud_server.disk.tables import MIGRATIONS
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.errors import UsageError
from ecavg.common.files import sync


class OpenStateDir:
    """The state directory of one server, which is open; every method may be called from any thread.

    Attributes:
        state_dir: the paths in the state directory.
        blobs: the files of weights and shards.
    """

    def __init__(
        self,
        path: Path,
        *,
        as_guest: bool = False,
        place: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Open the state directory at `path`; create the directory if it is missing.

        Args:
            path: the path of the state directory.
            place: where the blobs are, "files" or the URL of a bucket; None: wherever they were last.
            cache_bytes: how many bytes of a bucket's blobs are kept as files.
            as_guest: open the directory without its lock, beside the server that holds the lock. A guest
                leaves requests in the records, and the server carries them out.

        Raises:
            InUseError: another server holds the lock of the directory.
            UsageError: the directory cannot be used.
        """
        self.state_dir = StateDir(path)
        self._lock = RLock()
        # A guest has nothing to do with blobs.
        self.blobs = Blobs(self.state_dir, self._lock)
        with ExitStack() as resources:
            try:
                for folder in self.state_dir.folders:
                    folder.mkdir(parents=True, exist_ok=True)
                if not as_guest:
                    resources.enter_context(locked(self.state_dir))
                self._database = resources.enter_context(_database(self.state_dir, as_guest=as_guest))
                if not as_guest:
                    self.blobs = open_blobs(self.state_dir, self._lock, place, cache_bytes)
                    resources.callback(self.blobs.close)
                sync(path)
            except (OSError, sqlite3.DatabaseError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                raise UsageError(
                    f"cannot use state directory {path} ({what}): choose a writable one with --state-dir"
                ) from error
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Close the database and release the lock; a second call does nothing."""
        with self._lock:
            self._resources.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Return a context in which to write records: all of them become durable at its end, or none.

        No other thread reads or writes records during the context. Inside another transaction, the records
        become durable at the end of that one.
        """
        with self._lock, storage_errors():
            if self._database.in_transaction:
                yield self._database
                return
            with self._database as database:
                database.execute("BEGIN IMMEDIATE")
                yield database

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Return a context, inside a transaction, whose records are undone if the context raises."""
        self._database.execute("SAVEPOINT one")
        try:
            yield
        except BaseException:
            # After some errors, such as a full disk, SQLite has undone the whole transaction.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK TO one")
                self._database.execute("RELEASE one")
            raise
        self._database.execute("RELEASE one")

    def read(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Return the rows that a query finds; inside a transaction, also uncommitted ones."""
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def empty_log(self) -> None:
        """Empty the write-ahead log, in which deleted records would remain readable."""
        with self._lock:
            empty_log(self._database)


@contextmanager
def _database(state_dir: StateDir, *, as_guest: bool) -> Iterator[sqlite3.Connection]:
    """Open the database, bring its tables up to date, and close the database at the end of the context.

    Raises:
        UsageError: a guest finds the tables of another version of the server.
    """
    path = state_dir.database
    with closing(connect(path)) as database:
        if as_guest and version(database) != len(MIGRATIONS):
            raise UsageError(f"a server of another version uses {path}: stop it first")
        migrate(database, path, MIGRATIONS)
        if not as_guest:
            # A server that was killed may have left a write-ahead log.
            empty_log(database)
        yield database
