"""Those who watch the status: a person at the page, or `cloud-server status --watch`."""

import asyncio
import math
import time

# Whoever watches asks for the status again in this time.
LOOK_SECONDS = 2.0


class Viewers:
    """Those who have asked for the status, even before there was any."""

    def __init__(self) -> None:
        # When somebody last asked for the status, by the monotonic clock.
        self._looked_at = -math.inf

    def note(self) -> None:
        """Note that somebody has asked for the status."""
        self._looked_at = time.monotonic()

    async def stay(self) -> None:
        """Stay for long enough that whoever watches sees the status once more; else return at once."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)
