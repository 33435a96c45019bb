"""The readiness of a device to take part in a round, as a command of its user decides."""

import asyncio
from collections.abc import Callable, Sequence

from edge_agent.running import reason_of_failure

# The command has so much time; a device that cannot say so soon whether it is ready is not.
LIMIT_SECONDS = 30.0


class Readiness:
    """The answer to whether this device may take part in a round now.

    Args:
        command: the program and its arguments; the device is ready if the exit code is 0. Without a command
            the device is always ready.
        seconds: the time from one answer to the next question.
        say: called with a line for the user when the answer changes.
        on_change: called when the answer has changed.

    Attributes:
        is_ready: the last answer; False until there is one.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        say: Callable[[str], None],
        on_change: Callable[[bool], None],
    ) -> None:
        self._command = command
        self._seconds = seconds
        self._say = say
        self._on_change = on_change
        # True if the user was told last that the device is not ready.
        self._is_told = False
        self.is_ready = not command

    async def keep_asking(self) -> None:
        """Run the command again and again, for as long as this runs; return at once without a command."""
        while self._command:
            self._take(await self._reason_to_wait())
            await asyncio.sleep(self._seconds)

    def _take(self, reason: str) -> None:
        """Make this the answer; an empty reason means that the device is ready."""
        is_ready = not reason
        if is_ready == self._is_told:
            self._is_told = not is_ready
            not_ready = f"not ready: {reason}; taking part when ready_command says so"
            self._say("ready: taking part again" if is_ready else not_ready)
        if is_ready != self.is_ready:
            self.is_ready = is_ready
            self._on_change(is_ready)

    async def _reason_to_wait(self) -> str:
        """Run the command, and return why the device is not ready; an empty text if it is."""
        return await reason_of_failure(self._command, LIMIT_SECONDS)
