"""The readiness of a device to take part in a round, as the hours and a command of its user decide."""

import asyncio
from collections.abc import Callable, Sequence

from ecavg.edge_agent.hours import Hours, local_minute
from ecavg.edge_agent.running import reason_of_failure

# The command has so much time; a device that cannot say so soon whether it is ready is not.
LIMIT_SECONDS = 30.0


class Readiness:
    """The answer to whether this device may take part in a round now.

    Args:
        command: the program and its arguments; the device is ready if the exit code is 0. Without a command
            and hours the device is always ready.
        seconds: the time from one answer to the next question.
        say: called with a line for the user when the answer changes.
        on_change: called when the answer has changed.
        hours: outside of them the device is not ready, and the command is not run.
        minute: returns the minute of the day.

    Attributes:
        is_ready: the last answer; False until there is one.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        say: Callable[[str], None],
        on_change: Callable[[bool], None],
        hours: Sequence[Hours] = (),
        minute: Callable[[], int] = local_minute,
    ) -> None:
        self._command = command
        self._seconds = seconds
        self._say = say
        self._on_change = on_change
        self._hours = hours
        self._minute = minute
        # True if the user was told last that the device is not ready.
        self._is_told = False
        self.is_ready = not (command or hours)

    async def keep_asking(self) -> None:
        """Ask again and again, for as long as this runs; return at once where there is nothing to ask."""
        while self._command or self._hours:
            self._take(await self._reason_to_wait())
            await asyncio.sleep(self._seconds)

    def _take(self, reason: str) -> None:
        """Make this the answer; an empty reason means that the device is ready."""
        is_ready = not reason
        if is_ready == self._is_told:
            self._is_told = not is_ready
            self._say("ready: taking part again" if is_ready else f"not ready: {reason}")
        if is_ready != self.is_ready:
            self.is_ready = is_ready
            self._on_change(is_ready)

    async def _reason_to_wait(self) -> str:
        """Return why the device is not ready; an empty text if it is."""
        minute = self._minute()
        if self._hours and not any(hours.contain(minute) for hours in self._hours):
            return "it is outside of work_hours; taking part within them"
        reason = await reason_of_failure(self._command, LIMIT_SECONDS) if self._command else ""
        return f"{reason}; taking part when ready_command says so" if reason else ""
