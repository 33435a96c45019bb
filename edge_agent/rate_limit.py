"""The limit of the transfers of an agent: so many bytes a second at most, together."""

import asyncio
import time
from collections.abc import Awaitable, Callable

# So much time without transfers is made up for at most.
BURST_SECONDS = 1.0


class RateLimit:
    """A bound on the bytes a second of all transfers that share it.

    Args:
        bytes_per_second: None: there is no bound.
        monotonic: returns seconds that never decrease.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        bytes_per_second: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_second = bytes_per_second
        self._monotonic = monotonic
        self._sleep = sleep
        # When all that was let through so far has had its time.
        self._paid_until = monotonic()

    async def let_through(self, num_bytes: int) -> None:
        """Return when bytes that have just travelled have taken the time that the bound gives them."""
        if self._bytes_per_second is None:
            return
        now = self._monotonic()
        begin = max(now - BURST_SECONDS, self._paid_until)
        self._paid_until = begin + num_bytes / self._bytes_per_second
        await self._sleep(max(0.0, self._paid_until - now))
