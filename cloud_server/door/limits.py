"""The limits of one caller: the number of calls per second, and the number of open calls."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ecavg.common.errors import BusyError, Reason

# One caller may have so many open calls. An agent needs one for Watch, one or two for transfers, and some for
# calls that a dead connection has left open.
OPEN_CALLS = 16
# A caller that was quiet may make the calls of this many seconds at once.
BURST_SECONDS = 10.0
# So many callers are remembered. A caller that was dropped begins anew, with a whole burst.
_KEPT_CALLERS = 4096


@dataclass(slots=True)
class _Caller:
    """The record of one caller."""

    # The caller may make so many calls at `updated_at`, and more as time passes.
    calls_left: float
    updated_at: float
    num_open: int = 0


class CallLimits:
    """A token bucket and a count of open calls for each caller; for the event loop's thread only.

    Args:
        calls_per_second: how often one caller may call in the long run.
        clock: returns seconds that never decrease.
    """

    def __init__(self, calls_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = calls_per_second
        self._burst = max(1.0, calls_per_second * BURST_SECONDS)
        self._clock = clock
        self._callers: dict[str, _Caller] = {}

    @contextmanager
    def call(self, caller: str) -> Iterator[None]:
        """Count a call as made, and as open until it ends.

        Raises:
            BusyError: CALL_RATE or OPEN_CALLS; a refused call counts for neither.
        """
        record = self._record_of(caller)
        if record.num_open >= OPEN_CALLS:
            raise BusyError(
                f"{OPEN_CALLS} calls are open already: end one, then call again", Reason.OPEN_CALLS
            )
        if record.calls_left < 1:
            raise BusyError(
                f"more than {self._rate:g} calls a second: call again later, and less often", Reason.CALL_RATE
            )
        record.calls_left -= 1
        record.num_open += 1
        try:
            yield
        finally:
            record.num_open -= 1

    def _record_of(self, caller: str) -> _Caller:
        """Return the caller's record as of now, and make it the last in the order of the records."""
        now = self._clock()
        record = self._callers.pop(caller, None) or _Caller(self._burst, now)
        record.calls_left = min(self._burst, record.calls_left + (now - record.updated_at) * self._rate)
        record.updated_at = now
        self._callers[caller] = record
        self._drop_oldest()
        return record

    def _drop_oldest(self) -> None:
        """Drop one or two of the callers that have been quiet longest, if there are too many records.

        Each call adds at most one record, so two attempts per call keep the number of records bounded. A
        caller with an open call is not dropped.
        """
        for _ in range(2):
            if len(self._callers) > _KEPT_CALLERS:
                oldest = next(iter(self._callers))
                record = self._callers.pop(oldest)
                if record.num_open:
                    self._callers[oldest] = record
