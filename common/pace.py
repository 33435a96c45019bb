"""The pace of work under way: how fast it gets on, and how long it will take from here."""

import math
from collections import deque

# The pace is that of the last so many seconds, and more where the work is told of less often.
PACE_SECONDS = 20.0
# Of two moments that are closer than this only the first is kept, so that the memory stays bounded. A shorter
# time says nothing of a pace either: bytes travel by chunks, and a chunk arrives at once.
_STEP_SECONDS = 1.0


class Pace:
    """The pace of one piece of work, from what is told of it.

    Every time is in seconds of a clock that never decreases. Whoever tells every `pause_seconds` is not
    taken to stand still before that has passed.
    """

    def __init__(self) -> None:
        # The moments that count, oldest first, and the latest: each is a time, and what was done by then.
        self._moments: deque[tuple[float, float]] = deque()
        self._latest = (-math.inf, 0.0)

    def note(self, done: float, at: float) -> None:
        """Note that so many units were done at a time; less than before means that the work began anew."""
        if done < self._latest[1]:
            self._moments.clear()
        self._latest = at, done
        if not self._moments or at - self._moments[-1][0] >= _STEP_SECONDS:
            self._moments.append((at, done))
        while len(self._moments) > 2 and at - self._moments[1][0] >= PACE_SECONDS:
            self._moments.popleft()

    def rate(self, now: float, pause_seconds: float = _STEP_SECONDS) -> float | None:
        """Return the units a second; None until there is something to measure."""
        if not self._moments:
            return None
        began_at, before = self._moments[0]
        latest_at, done = self._latest
        seconds = max(latest_at, now - 2 * pause_seconds) - began_at
        return (done - before) / seconds if seconds >= _STEP_SECONDS and latest_at > began_at else None

    def seconds_left(
        self, total: float | None, now: float, pause_seconds: float = _STEP_SECONDS
    ) -> float | None:
        """Return how long the rest will take; None if that is unknown, or the work stands still."""
        rate = self.rate(now, pause_seconds)
        if total is None or not rate:
            return None
        latest_at, done = self._latest
        return max(0.0, (total - done) / rate - (now - latest_at))


def duration(seconds: float) -> str:
    """Return a duration for people, in its largest unit: "40 s", "4 min", "3 h" or "2 d"."""
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if round(seconds / size) * size < limit:
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds / 86_400)} d"
