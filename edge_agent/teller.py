"""What tells the server how far this agent is, seldom enough to cost nobody anything."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from ecavg.common.agent_progress import AgentProgress
from ecavg.common.errors import ECAvgError
from ecavg.edge_agent.client import CloudClient

# Nothing is told of an activity that is shorter.
FIRST_SECONDS = 1.0
# A server that does not answer, or that does not know the call, is told again after this time.
AGAIN_SECONDS = 60.0

log = structlog.get_logger()


class Teller:
    """The teller of one agent: the latest progress of one activity, as often as the server asks for it."""

    def __init__(self, client: CloudClient) -> None:
        self._client = client
        self._latest: AgentProgress | None = None
        # A last word that is on its way; a task needs somebody who holds it.
        self._farewells: set[asyncio.Task[None]] = set()

    def note(self, progress: AgentProgress) -> None:
        """Take how far the agent is; any thread may call this as often as it likes."""
        self._latest = progress

    @asynccontextmanager
    async def telling(self, begun: AgentProgress) -> AsyncIterator[None]:
        """Tell of an activity, once it has lasted for a while, until the context ends."""
        self._latest = begun
        has_told = asyncio.Event()
        task = asyncio.create_task(self._keep_telling(has_told))
        try:
            yield
        finally:
            task.cancel()
            if has_told.is_set():
                self._say_that_it_is_over(task)

    def close(self) -> None:
        """Say nothing more."""
        for task in self._farewells:
            task.cancel()

    async def _keep_telling(self, has_told: asyncio.Event) -> None:
        pause_seconds = FIRST_SECONDS
        while True:
            await asyncio.sleep(pause_seconds)
            has_told.set()
            pause_seconds = await self._tell(self._latest)

    async def _tell(self, progress: AgentProgress | None) -> float:
        """Tell the server once; return after how many seconds it is to be told again."""
        try:
            return max(FIRST_SECONDS, await self._client.tell_progress(progress))
        except ECAvgError as error:
            # Nothing depends on it: whatever is wrong, another call finds out.
            log.debug("progress_not_told", reason=str(error))
            return AGAIN_SECONDS

    def _say_that_it_is_over(self, telling: asyncio.Task[None]) -> None:
        async def say() -> None:
            # What was told before may still be on its way.
            await asyncio.wait([telling])
            await self._tell(None)

        task = asyncio.create_task(say())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
