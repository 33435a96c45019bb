"""The thread that writes to the trackers what the records hold and they do not.

The rounds themselves never wait: they wake the thread, and that is all. Nothing is queued in memory, because
the records are the queue. So what a tracker missed, while it was down or the server was, is written later.
"""

import asyncio
import re
import threading
import time
from collections.abc import Sequence

import structlog

from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking import facts
from ecavg.cloud_server.tracking.tracker import Tracker
from ecavg.common.errors import one_line

# A tracker that failed is tried again after this time.
RETRY_SECONDS = 15.0
# How long the end of a run waits for the trackers.
FINISH_SECONDS = 20.0
# How long the end of the process waits for a write that has begun.
STOP_SECONDS = 1.0

log = structlog.get_logger()


class TrackingThread:
    """A thread that keeps one tracker up to date with the records."""

    def __init__(self, tracker: Tracker, store: Store, *, with_agent_ids: bool) -> None:
        self._tracker = tracker
        self._store = store
        self._with_agent_ids = with_agent_ids
        # The order of the last part of a round that was written; None: the tracker is not open.
        self._told: int | None = None
        self._is_failing = False
        self._is_run_over = False
        self._is_stopped = False
        self._wanted = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name=f"tracking-{tracker.name}", daemon=True)
        self._thread.start()

    def wake(self, *, is_run_over: bool = False) -> None:
        """Have what is on record written; return at once."""
        self._is_run_over |= is_run_over
        self._wanted.set()

    def wait(self, seconds: float) -> None:
        """Wait until all of a run that is over is written, but no longer than this."""
        if not self._done.wait(seconds):
            log.warning("tracker_left_behind", tracker=self._tracker.name)

    def stop(self) -> None:
        """End the thread, which may be in the middle of a write that takes long."""
        self._is_stopped = True
        self._wanted.set()
        self._thread.join(STOP_SECONDS)

    def _keep_up(self) -> None:
        while not self._is_stopped and not self._done.is_set():
            self._wanted.wait(RETRY_SECONDS if self._is_failing else None)
            self._wanted.clear()
            if not self._is_stopped:
                self._try_to_write()

    def _try_to_write(self) -> None:
        is_run_over = self._is_run_over
        try:
            self._write(is_run_over)
        except Exception as error:
            self._told = None
            self._note_failure(error)
            return
        if self._is_failing:
            self._is_failing = False
            log.info("tracker_works_again", tracker=self._tracker.name)
        if is_run_over:
            self._done.set()

    def _write(self, is_run_over: bool) -> None:
        if self._told is None:
            # The last round that is there may be there in part, and the edges of the one before missing.
            self._told = 2 * self._tracker.open(facts.of_run(self._store)) - 2
        parts = facts.of_rounds(
            self._store, self._told, is_run_over=is_run_over, with_agent_ids=self._with_agent_ids
        )
        for part in parts:
            if self._is_stopped:
                return
            self._tracker.write(part)
            self._told = part.order
        if is_run_over:
            self._tracker.finish()

    def _note_failure(self, error: Exception) -> None:
        """Log the first of a row of failures; the database is closed while the process ends."""
        if not self._is_failing and not self._is_stopped:
            # An address may have a password.
            reason = re.sub(r"//[^/@\s]+@", "//", one_line(str(error)))[:300] or type(error).__name__
            log.warning("tracker_failing", tracker=self._tracker.name, reason=reason)
        self._is_failing = True


class Tracking:
    """The trackers of a server."""

    def __init__(self, trackers: Sequence[Tracker], store: Store, *, with_agent_ids: bool = False) -> None:
        self._threads = [TrackingThread(each, store, with_agent_ids=with_agent_ids) for each in trackers]

    def note_round_over(self) -> None:
        """Have the round that is over written, while everything else goes on."""
        for thread in self._threads:
            thread.wake()

    async def finish(self) -> None:
        """Have the rest of the run written; wait for that, but not long."""
        for thread in self._threads:
            thread.wake(is_run_over=True)
        until = time.monotonic() + FINISH_SECONDS
        for thread in self._threads:
            await asyncio.to_thread(thread.wait, max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """End the threads before the records are closed."""
        for thread in self._threads:
            thread.stop()
