"""The erasing of an agent from a running server's disk; upkeep/forgetting.py says what is erased."""

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.disk.tables import ForgettingRow
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.training.runner import JobRunner
from ecavg.cloud_server.upkeep import forgetting
from ecavg.cloud_server.upkeep.forgotten import to_forget

log = structlog.get_logger()


class Eraser:
    """The part of a server that erases agents, and stops the trainer where it works with what they have sent.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, jobs: JobRunner, clock: Callable[[], float]) -> None:
        self._store = store
        self._jobs = jobs
        self._clock = clock

    async def waiting(self) -> list[ForgettingRow]:
        """Return the agents that are to be forgotten, and are not yet."""
        return await asyncio.to_thread(to_forget, self._store)

    async def finish(self) -> None:
        """Erase the agents whose forgetting was interrupted by a stop of the server."""
        for row in await self.waiting():
            await when_disk_allows(partial(self.erase, row))

    async def erase(self, row: ForgettingRow) -> None:
        """Remove all that the disk has of the agent.

        Raises:
            StorageError, OSError: the disk does not let it; do it again.
        """
        assert row.agent_id is not None
        async with self._jobs.withdrawn_from(row.agent_id):
            work = await asyncio.to_thread(forgetting.unfinished_work, self._store, row.agent_id)
            if work:
                # In this thread: nobody shall see the job withdrawn between two looks at it.
                work.withdraw()
                await self._jobs.drop_work()
            await asyncio.to_thread(forgetting.forget, self._store, row, self._clock())
        log.warning("agent_forgotten", pseudonym=row.pseudonym)
