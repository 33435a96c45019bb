"""The server's clock as this device knows it, for the device's own clock may be wrong."""

import asyncio
import time
from collections.abc import Callable

from ecavg.common import clock, tls


class ServerClock:
    """The time that the server has last told, carried on by the monotonic clock.

    Args:
        tell: called with one line, once, if the clock of this device shows another time.
        wall: the clock of this device, in seconds since the epoch.
        monotonic: returns seconds that never decrease.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._wall = wall
        self._monotonic = monotonic
        self._offset_seconds = 0.0
        self._has_told = False
        self._is_known = asyncio.Event()

    def heard(self, server_time: float) -> None:
        """Note the time that the server has told; a senseless one is left aside."""
        if not 0 < server_time < tls.NEVER.timestamp():
            return
        self._offset_seconds = server_time - self._monotonic()
        self._is_known.set()
        difference = describe_difference(self._wall(), server_time)
        if difference and not self._has_told:
            self._has_told = True
            self._tell(difference)

    async def now(self) -> float:
        """Return the server's time in seconds since the epoch, once the server has told it."""
        await self._is_known.wait()
        return self._offset_seconds + self._monotonic()


def describe_difference(own: float, server_time: float) -> str:
    """Return by how much the clocks of device and server differ and whose to set; "": they agree."""
    if abs(own - server_time) < clock.TOLERANCE_SECONDS:
        return ""
    way = "behind" if own < server_time else "ahead of"
    apart = clock.span(abs(own - server_time))
    if server_time < clock.MADE_AT <= own:
        return f"this device's clock is {apart} ahead of the server's, which is wrong: have that one set"
    return f"this device's clock is {apart} {way} the server's: set it ({clock.HOW_TO_SET})"
