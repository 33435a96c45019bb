"""The limits of one caller: how many calls in a second, and how many at once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import BusyError, Reason

# One caller may have so many: an agent has a Watch, a transfer or two, and the leftovers of a dead line.
OPEN_CALLS = 16
# A caller that was quiet may make the calls of so many seconds at once.
BURST_SECONDS = 10.0
# So many quiet callers are remembered; older ones begin anew, with a whole burst.
_KEPT_CALLERS = 4096


@dataclass(slots=True)
class _Caller:
    # How many calls the caller may still make.
    calls: float
    # When `calls` was computed.
    at: float
    num_open: int = 0


class CallLimits:
    """A token bucket and a number of open calls for each caller; for the event loop's thread only.

    Args:
        calls_per_second: how often one caller may call in the long run.
        clock: seconds that only ever grow.
    """

    def __init__(self, calls_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = calls_per_second
        self._burst = max(1.0, calls_per_second * BURST_SECONDS)
        self._clock = clock
        self._callers: dict[str, _Caller] = {}

    @contextmanager
    def call(self, caller: str) -> Iterator[None]:
        """Count a call for as long as it lasts.

        Raises:
            BusyError: CALL_RATE or OPEN_CALLS; a refused call counts for neither.
        """
        record = self._record(caller)
        if record.num_open >= OPEN_CALLS:
            raise BusyError(
                f"{OPEN_CALLS} calls are open already: end one, then call again", Reason.OPEN_CALLS
            )
        if record.calls < 1:
            raise BusyError(
                f"more than {self._rate:g} calls a second: call again later, and less often", Reason.CALL_RATE
            )
        record.calls -= 1
        record.num_open += 1
        try:
            yield
        finally:
            record.num_open -= 1

    def _record(self, caller: str) -> _Caller:
        """Return the caller's record, with the calls that it has earned by now."""
        now = self._clock()
        record = self._callers.pop(caller, None) or _Caller(self._burst, now)
        record.calls = min(self._burst, record.calls + (now - record.at) * self._rate)
        record.at = now
        self._callers[caller] = record
        self._forget()
        return record

    def _forget(self) -> None:
        """Drop the oldest callers that are not calling now.

        At most one caller is new at a time, so looking at the two oldest keeps the book bounded.
        """
        for _ in range(2):
            if len(self._callers) > _KEPT_CALLERS:
                oldest = next(iter(self._callers))
                record = self._callers.pop(oldest)
                if record.num_open:
                    self._callers[oldest] = record
