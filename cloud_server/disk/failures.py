"""Errors of a disk that is full, read-only or failing for a while."""

import asyncio
import errno
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog

from ecavg.common.errors import StorageError
from ecavg.common.files import error_number, is_full

# `when_disk_allows` pauses for this time between two attempts.
STORAGE_RETRY_SECONDS = 2.0

# Like a full disk, these errors last until an operator acts: the disk is read-only, forbidden or failing.
_NEEDS_OPERATOR = {errno.EROFS, errno.EACCES, errno.EIO}
_STORAGE_SQLITE_CODES = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
}

_T = TypeVar("_T")

log = structlog.get_logger()


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the errors of a full, read-only or failing disk into StorageError."""
    try:
        yield
    except OSError as error:
        number = error_number(error)
        if number is not None and (is_full(error) or number in _NEEDS_OPERATOR):
            raise _storage_error(os.strerror(number)) from error
        raise
    except sqlite3.OperationalError as error:
        primary_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if primary_code in _STORAGE_SQLITE_CODES:
            raise _storage_error(str(error)) from error
        raise


def _storage_error(what: str) -> StorageError:
    return StorageError(
        f"the server's disk takes no data now ({what}): its operator must see to it; try again later"
    )


async def when_disk_allows(body: Callable[[], Awaitable[_T]]) -> _T:
    """Run `body` until it does not raise StorageError, with pauses between, and return its result.

    The event loop serves other tasks during the pauses.
    """
    while True:
        try:
            return await body()
        except StorageError as error:
            log.error("disk_refuses", reason=str(error))
            await asyncio.sleep(STORAGE_RETRY_SECONDS)
