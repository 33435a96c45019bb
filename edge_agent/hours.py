"""Hours of the day, in the local time of the device, such as 22:00-06:00."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from ecavg.common.errors import UsageError, one_line

_PATTERN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY_MINUTES = 24 * 60
# The clock may be set, and the device may sleep, so it is looked at so often.
POLL_SECONDS = 15.0


class Hours(NamedTuple):
    """A part of each day; it goes over midnight where it ends earlier than it begins."""

    # Minutes since midnight.
    begin: int
    # Minutes since midnight; this minute is not part of the hours.
    end: int

    def contain(self, minute: int) -> bool:
        """Return True if a minute of the day, counted from midnight, is in these hours."""
        return (minute - self.begin) % _DAY_MINUTES < (self.end - self.begin) % _DAY_MINUTES


def parse_hours(text: str) -> Hours:
    """Return the hours that a text such as 22:00-06:00 names.

    Raises:
        UsageError: it names none.
    """
    found = _PATTERN.fullmatch(text)
    numbers = [int(number) for number in found.groups()] if found else [0, 0, 0, 0]
    hours = Hours(60 * numbers[0] + numbers[1], 60 * numbers[2] + numbers[3])
    if hours.begin == hours.end:
        raise UsageError(f"{one_line(text)!r} are no hours: write begin and end, such as 22:00-06:00")
    return hours


def local_minute(clock: Callable[[], time.struct_time] = time.localtime) -> int:
    """Return the minute of the day on the clock of this device."""
    now = clock()
    return 60 * now.tm_hour + now.tm_min


def are_now(hours: Sequence[Hours], minute: int) -> bool:
    """Return True if the minute of the day is in one of these parts of it."""
    return any(each.contain(minute) for each in hours)


class UploadHours:
    """The hours in which uploads begin.

    Args:
        hours: parts of the day; without any an upload begins at any time.
        say: called with a line for the user when an upload has to wait, and when it begins after that.
        minute: returns the minute of the day.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        hours: Sequence[Hours] = (),
        say: Callable[[str], None] = lambda _: None,
        minute: Callable[[], int] = local_minute,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._hours = hours
        self._say = say
        self._minute = minute
        self._sleep = sleep

    async def wait(self, on_change: Callable[[bool], None]) -> None:
        """Return as soon as an upload may begin.

        Args:
            on_change: called with True when the upload has to wait, and with False when it waits no more.
        """
        if self._is_time():
            return
        self._say("waiting to upload: it is outside of upload_hours")
        on_change(True)
        try:
            while not self._is_time():
                await self._sleep(POLL_SECONDS)
            self._say("uploading: it is within upload_hours")
        finally:
            on_change(False)

    def _is_time(self) -> bool:
        return not self._hours or are_now(self._hours, self._minute())
