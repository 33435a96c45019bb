"""How far each agent is, in memory only: what agents tell, and the transfers that the server sees itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.pace import Pace

# An agent need not tell its progress more often than this.
LEAST_PAUSE_SECONDS = 1.0
# All agents together are asked for so many calls of Progress in a second, so that a thousand of them cost the
# server a few hundredths of a processor.
CALLS_PER_SECOND = 50
# Calls that come a little early, as the network has it, are looked at.
_TOLERANCE = 0.8


class Shown(NamedTuple):
    """The progress of an agent with its pace, as it is shown."""

    progress: AgentProgress
    # In units a second; None: unknown.
    rate: float | None
    # None: unknown.
    seconds_left: float | None


class Work:
    """One piece of work of an agent that is under way.

    Args:
        pause_seconds: how long nothing may be heard of work that gets on.
    """

    def __init__(
        self, progress: AgentProgress, now: float, pause_seconds: float = LEAST_PAUSE_SECONDS
    ) -> None:
        self.progress = progress
        self.pause_seconds = pause_seconds
        self.noted_at = now
        self._pace = Pace()
        self._pace.note(progress.done, now)

    def note(self, progress: AgentProgress, now: float) -> None:
        """Note how far the work is."""
        self.progress, self.noted_at = progress, now
        self._pace.note(progress.done, now)

    def shown(self, now: float) -> Shown:
        """Return the progress with its pace."""
        rate = self._pace.rate(now, self.pause_seconds)
        return Shown(
            self.progress, rate, self._pace.seconds_left(self.progress.total, now, self.pause_seconds)
        )


class ProgressBoard:
    """The progress of all agents; for the event loop's thread only.

    Args:
        clock: returns seconds that never decrease.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By agent id: what the agent has told, and its transfers, in the order in which they began.
        self._told: dict[str, Work] = {}
        self._transfers: dict[str, list[tuple[str, Work]]] = {}

    def tell(self, agent_id: str, progress: AgentProgress | None) -> float:
        """Take what an agent tells; return for how many seconds it need not tell more of the same activity.

        What comes too soon after the last is dropped.

        Args:
            progress: None: the agent does nothing now that takes long.
        """
        now, pause_seconds = self._clock(), self._pause_seconds
        work = self._told.get(agent_id)
        if progress is None:
            self._told.pop(agent_id, None)
        elif work is None:
            self._told[agent_id] = Work(progress, now, pause_seconds)
        else:
            is_same = work.progress.activity is progress.activity
            if now - work.noted_at >= _TOLERANCE * (work.pause_seconds if is_same else LEAST_PAUSE_SECONDS):
                self._take(agent_id, work, progress, now)
        return pause_seconds

    def _take(self, agent_id: str, work: Work, progress: AgentProgress, now: float) -> None:
        if work.progress.activity is progress.activity:
            work.note(progress, now)
            work.pause_seconds = self._pause_seconds
        else:
            self._told[agent_id] = Work(progress, now, self._pause_seconds)

    @property
    def _pause_seconds(self) -> float:
        return max(LEAST_PAUSE_SECONDS, len(self._told) / CALLS_PER_SECOND)

    @contextmanager
    def transfer(self, agent_id: str, kind: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        """Show a transfer until the context ends; it yields what to call with the bytes that have moved.

        Args:
            kind: "weights" or "data" for an upload, "model" for a download.
            total: the bytes of the whole blob.
            done: the bytes of it that were there before.
        """
        activity = Activity.DOWNLOADING if kind == "model" else Activity.UPLOADING
        work = Work(AgentProgress(activity, done, total), self._clock())
        entry = kind, work
        self._transfers.setdefault(agent_id, []).append(entry)

        def moved(num_bytes: int) -> None:
            progress = work.progress
            work.note(progress._replace(done=progress.done + num_bytes), self._clock())

        try:
            yield moved
        finally:
            self._transfers[agent_id].remove(entry)
            if not self._transfers[agent_id]:
                del self._transfers[agent_id]

    def forget(self, agent_id: str) -> None:
        """Drop what an agent has told: it is away, or forgotten."""
        self._told.pop(agent_id, None)

    def of(self, agent_id: str) -> Shown | None:
        """Return what an agent is doing; None: nobody knows.

        An agent uploads its images while it trains, so such an upload is shown only where it does nothing
        else. What it told before it began another transfer is out of date.
        """
        transfers = dict(self._transfers.get(agent_id, ()))
        first = [
            transfers.get("model"),
            transfers.get("weights"),
            self._told.get(agent_id),
            transfers.get("data"),
        ]
        now = self._clock()
        return next((work.shown(now) for work in first if work), None)

    def num_transfers(self, *kinds: str) -> int:
        """Return how many transfers of these kinds are under way."""
        return sum(kind in kinds for entries in self._transfers.values() for kind, _ in entries)
