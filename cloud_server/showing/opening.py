"""When the next round opens after one is over, and how that is said."""

from datetime import UTC, tzinfo
from typing import NamedTuple

from ecavg.common.cron import CronLine, spoken


class Opening(NamedTuple):
    """What the next round waits for; it opens at once where that is nothing."""

    # A time, in seconds since the epoch; None: no time is waited for.
    at: float | None = None
    # So many new examples on the agents that are connected; None: none are waited for.
    num_examples: int | None = None
    # The time zone in which the time is said.
    zone: tzinfo = UTC

    def is_due(self, now: float, num_new_examples: int) -> bool:
        """Return True if the round is to open now.

        Args:
            now: seconds since the epoch.
            num_new_examples: how many new examples the agents have that are connected.
        """
        is_time = self.at is None or now >= self.at
        return is_time and (self.num_examples is None or num_new_examples >= self.num_examples)

    def sentence(self, now: float, num_new_examples: int) -> str | None:
        """Return for what the next round waits, for people; None: for nothing."""
        if self.at is not None:
            return f"The next round opens {spoken(self.at, now, self.zone)}."
        if self.num_examples is not None:
            return (
                f"The next round opens when the agents that are here have {self.num_examples} new examples:"
                f" {num_new_examples} so far."
            )
        return None


class OpeningRule(NamedTuple):
    """What each round waits for after the one before, as the operator wants it."""

    # The times at which a round may open; None: at any time.
    times: CronLine | None = None
    # So many new examples are waited for; None: none are.
    num_examples: int | None = None

    def after(self, ended_at: float, now: float) -> Opening:
        """Return what the next round waits for; both times are in seconds since the epoch.

        It is the first time after the end of the last round, so a server that starts again finds the same,
        and a time that it was not there for is made up for. An end in the future, by a clock that was wrong,
        counts as now.
        """
        if self.times is None:
            return Opening(num_examples=self.num_examples)
        return Opening(self.times.next_after(min(ended_at, now)), self.num_examples, self.times.zone)
