"""Lines of cron, such as "0 2 * * *": at which times something is to be done.

Over a change of the clock they mean what they mean in Debian's cron: what falls into the hour that is left
out in spring is done right after it, and what falls into the hour that comes twice in autumn is done once. A
line whose hours are `*` goes by time that passes.
"""

import os
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from ecavg.common.errors import UsageError, one_line
from ecavg.common.pace import duration

_LOCAL = Path("/etc/localtime")
_NUM_FIELDS = 5


class CronLine(NamedTuple):
    """The times that a line of cron names in a time zone."""

    text: str
    zone: tzinfo

    def next_after(self, at: float) -> float:
        """Return the first time after `at` that the line names; both in seconds since the epoch."""
        return next(CronSim(self.text, datetime.fromtimestamp(at, self.zone))).timestamp()


def parse_cron(text: str, zone: tzinfo) -> CronLine:
    """Return the times that a line of cron names.

    Raises:
        UsageError: the line is none, or names no time.
    """
    line = CronLine(" ".join(text.split()), zone)
    try:
        if len(text.split()) != _NUM_FIELDS:
            raise CronSimError("Bad number of fields")
        line.next_after(time.time())
    except (CronSimError, StopIteration) as error:
        what = str(error).replace("Bad ", "wrong is its ") or "it names no day that there is"
        raise UsageError(
            f"{one_line(text)!r} is no line of cron ({what}): write minute, hour, day of the month, month and"
            ' day of the week, such as "0 2 * * *" for two o\'clock each night'
        ) from error
    return line


def parse_zone(name: str | None) -> tzinfo:
    """Return the time zone with this name, such as Europe/Berlin; None: that of this machine.

    Raises:
        UsageError: this machine knows no such time zone.
    """
    if name is None:
        return local_zone()
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise UsageError(
            f"{one_line(name)!r} is no time zone of this machine: write a name such as Europe/Berlin or UTC"
        ) from error


def local_zone() -> tzinfo:
    """Return the time zone of this machine, with its changes of the clock where they can be known."""
    try:
        if name := os.environ.get("TZ", "").removeprefix(":"):
            return ZoneInfo(name)
        with _LOCAL.open("rb") as file:
            return ZoneInfo.from_file(file)
    except (KeyError, ValueError, OSError):
        # TZ may have rules instead of a name, such as "<+03>-3".
        return datetime.now().astimezone().tzinfo or UTC


def spoken(at: float, now: float, zone: tzinfo) -> str:
    """Return a time to come for people: "at 02:00 CET (in 3 h)", with its day if it is not within a day."""
    when = datetime.fromtimestamp(at, zone)
    day = "" if at - now < 86_400 else f"on {when:%Y-%m-%d} "
    return f"{day}at {when:%H:%M %Z}".rstrip() + f" (in {duration(max(0.0, at - now))})"
