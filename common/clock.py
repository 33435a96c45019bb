"""Wall clocks, which may be wrong: what is known of the true time, and how people are told.

Devices without a battery start in 1970, and others where a wrong clock was set. Therefore nothing here and
nowhere else depends on a wall clock where a monotonic clock will do.
"""

from datetime import UTC, datetime

# This version was made on that day, so a clock that says less is wrong. Each release moves the day on.
MADE_AT = datetime(2026, 11, 28, tzinfo=UTC).timestamp()
# Clocks may differ by so much before anybody is told.
TOLERANCE_SECONDS = 300.0
# A clock may be set back by so much, and what was recorded before that still counts as past.
SET_BACK_SECONDS = 24 * 3600.0
HOW_TO_SET = "timedatectl set-ntp true"

_UNITS = (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


def day(seconds: float) -> str:
    """Return the day of a time in seconds since the epoch, in UTC: "2026-11-28"."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def span(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two: "3 days"."""
    for unit, length in _UNITS:
        if (number := round(seconds / length)) > 1:
            return f"{number} {unit}"
    return "a moment"


def doubt(now: float, newest_record: float) -> str:
    """Return why this machine's clock is evidently wrong, in one line; "" if nothing speaks against it.

    Args:
        now: what the clock says, in seconds since the epoch.
        newest_record: the latest time in the server's records.
    """
    if now < MADE_AT:
        return (
            f"this machine's clock says {day(now)}, and this version was made on {day(MADE_AT)}:"
            f" set the clock ({HOW_TO_SET})"
        )
    if now < newest_record - SET_BACK_SECONDS:
        return (
            f"this machine's clock says {day(now)}, and the server's records reach to {day(newest_record)}:"
            f" if the clock is behind, set it ({HOW_TO_SET}); if it was ahead then, join tokens of that time"
            " do not count"
        )
    return ""
