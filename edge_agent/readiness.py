"""The readiness of a device to take part in a round, as its user's configuration decides.

All reasons why a device is not ready come together here. They are looked at in order, the cheap ones first,
and the first that holds is the one that is told.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from ecavg.common.cron import CronLine, spoken
from ecavg.common.run_state import Wait
from ecavg.edge_agent.hours import Hours, are_now, local_minute
from ecavg.edge_agent.running import reason_of_failure

# The command has so much time; a device that cannot say so soon whether it is ready is not.
LIMIT_SECONDS = 30.0


class Unready(NamedTuple):
    """A reason why the device is not ready."""

    waits_for: Wait
    # For the user, in one line.
    text: str


# Looks whether a reason holds now; cheap enough to be called at any time.
Condition = Callable[[], Awaitable[Unready | None]]


class Readiness:
    """The answer to whether this device may take part in a round now.

    Args:
        conditions: what is looked at first; without any and a command the device is always ready.
        command: the program and its arguments; the device is ready if the exit code is 0. It is run only
            where no condition speaks against it.
        seconds: the time from one answer to the next question.
        say: called with a line for the user when the answer changes.
        on_change: called with what the device waits for when that has changed; None: it is ready.

    Attributes:
        is_ready: the last answer; False until there is one.
        waits_for: why the device is not ready; None: it is, or there is no answer yet.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        say: Callable[[str], None],
        on_change: Callable[[Wait | None], None],
        conditions: Sequence[Condition] = (),
    ) -> None:
        self._command = command
        self._seconds = seconds
        self._say = say
        self._on_change = on_change
        self._conditions = conditions
        # An answer that was being found when this grew may be of before, and does not count.
        self._num_looks = 0
        # The wait of which the user was told last; None: the device is ready.
        self._told: Wait | None = None
        self.waits_for: Wait | None = None
        self.is_ready = not (command or conditions)

    async def keep_asking(self) -> None:
        """Ask again and again, for as long as this runs; return at once where there is nothing to ask."""
        while self._command or self._conditions:
            num_looks = self._num_looks
            unready = await self._first_reason() or await self._reason_of_command()
            if num_looks == self._num_looks:
                self._take(unready)
                await asyncio.sleep(self._seconds)

    async def look(self) -> None:
        """Take it at once if a condition speaks against it; the command is not run for that."""
        self._num_looks += 1
        if unready := await self._first_reason():
            self._take(unready)

    def _take(self, unready: Unready | None) -> None:
        """Make this the answer; None: the device is ready."""
        waits_for = unready and unready.waits_for
        if waits_for != self._told:
            self._told = waits_for
            self._say(f"not ready: {unready.text}" if unready else "ready: taking part again")
        is_ready = unready is None
        if (is_ready, waits_for) != (self.is_ready, self.waits_for):
            self.is_ready, self.waits_for = is_ready, waits_for
            self._on_change(waits_for)

    async def _first_reason(self) -> Unready | None:
        for condition in self._conditions:
            if unready := await condition():
                return unready
        return None

    async def _reason_of_command(self) -> Unready | None:
        reason = await reason_of_failure(self._command, LIMIT_SECONDS) if self._command else ""
        if not reason:
            return None
        return Unready(Wait.COMMAND, f"{reason}; taking part when ready_command says so")


def within(hours: Sequence[Hours], minute: Callable[[], int] = local_minute) -> Condition:
    """Return the condition that it is within one of these parts of the day.

    Args:
        minute: returns the minute of the day.
    """

    async def look() -> Unready | None:
        if are_now(hours, minute()):
            return None
        return Unready(Wait.HOURS, "it is outside of work_hours; taking part within them")

    return look


def at_times(
    times: CronLine, waits_since: Callable[[], float], clock: Callable[[], float] = time.time
) -> Condition:
    """Return the condition that one of these times has come.

    Args:
        waits_since: returns since when the next of the times is waited for, in seconds since the epoch.
        clock: returns seconds since the epoch.
    """

    async def look() -> Unready | None:
        now = clock()
        # By a clock that was wrong, the agent may wait since a time to come.
        due = times.next_after(min(waits_since(), now))
        if due <= now:
            return None
        return Unready(Wait.TIME, f"pretrain_at is {spoken(due, now, times.zone)}; taking part then")

    return look


def with_examples(min_examples: int, count_new: Callable[[], Awaitable[int]]) -> Condition:
    """Return the condition that there are so many new examples.

    Args:
        count_new: returns how many there are.
    """

    async def look() -> Unready | None:
        number = await count_new()
        if number >= min_examples:
            return None
        return Unready(
            Wait.EXAMPLES, f"there are {number} new examples; taking part with {min_examples} of them"
        )

    return look
