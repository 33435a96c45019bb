"""Writing what the run cannot go on without, on a disk that may be full or read-only for a while."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from common.errors import StorageError

STORAGE_RETRY_SECONDS = 2.0  # between two tries

_T = TypeVar("_T")

log = structlog.get_logger()


async def when_disk_allows(body: Callable[[], Awaitable[_T]]) -> _T:
    """Do it, again and again as long as it raises StorageError: others are served meanwhile."""
    while True:
        try:
            return await body()
        except StorageError as error:
            log.error("disk_refuses", reason=str(error))
            await asyncio.sleep(STORAGE_RETRY_SECONDS)
