"""Hours of the day, in the local time of the device, such as 22:00-06:00."""

import re
import time
from collections.abc import Callable
from typing import NamedTuple

from ecavg.common.errors import UsageError, one_line

_PATTERN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY_MINUTES = 24 * 60


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
