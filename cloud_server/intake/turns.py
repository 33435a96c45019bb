"""The order of uploads: so many are taken in at a time, and the others wait in the order of their arrival."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """Turns to upload; for the event loop's thread only.

    Args:
        most: how many uploads may have their turn at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.num_taken = 0
        # Who waits, the first to come first; a turn is given by its future.
        self._waiting: dict[asyncio.Future[None], str] = {}

    @asynccontextmanager
    async def turn(self, agent_id: str) -> AsyncIterator[Callable[[], None]]:
        """Wait for a turn, and have it until the context ends, or until the returned function is called."""
        await self._wait_for_turn(agent_id)
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._end_turn()

        try:
            yield end
        finally:
            end()

    @property
    def num_waiting(self) -> int:
        """Return how many uploads wait."""
        return len(self._waiting)

    @property
    def places(self) -> dict[str, int]:
        """Return the place in the queue, from 1 on, of the first waiting upload of each agent."""
        places: dict[str, int] = {}
        for place, agent_id in enumerate(self._waiting.values(), start=1):
            places.setdefault(agent_id, place)
        return places

    async def _wait_for_turn(self, agent_id: str) -> None:
        if self.num_taken < self._most:
            self.num_taken += 1
            return
        given = asyncio.get_running_loop().create_future()
        self._waiting[given] = agent_id
        try:
            await given
        except asyncio.CancelledError:
            # The turn may have been given just before the caller went away.
            if self._waiting.pop(given, None) is None:
                self._end_turn()
            raise

    def _end_turn(self) -> None:
        """Give the turn to whoever has waited longest."""
        if not self._waiting:
            self.num_taken -= 1
            return
        first = next(iter(self._waiting))
        del self._waiting[first]
        # A future that was cancelled belongs to a caller that gives the turn on when it comes to that.
        if not first.done():
            first.set_result(None)
