"""The progress display of a process: bars at a terminal, events in a log."""

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from common.errors import one_line

# Two "progress" events of one label are at least so far apart.
LOGGED_PROGRESS_SECONDS = 5.0
# A long-running process uses ever new labels. Only the state of the latest labels is kept.
KEPT_LABELS = 32
# When a new bar begins, a bar that has not moved for this time becomes a finished line.
STANDSTILL_SECONDS = 1.0

_T = TypeVar("_T")


class ProgressDisplay(Protocol):
    """A display of the progress of each labelled piece of work, at the terminal or in the log.

    Any thread may call the methods.
    """

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` units of `label` are finished, and beside them the text `detail`.

        The work is finished when `done` equals `total`.
        """

    def message(self, text: str) -> None:
        """Print one line that stays on the terminal."""

    def close(self) -> None:
        """Restore the terminal; a second call does nothing."""


def progress_display() -> ProgressDisplay:
    """Return a display with bars if stderr is a terminal, otherwise one that logs "progress" events."""
    return _ProgressBars() if sys.stderr.isatty() else _ProgressLog()


class _LatestLabels(dict[str, _T]):
    """A dict that keeps only the KEPT_LABELS labels that were set last."""

    def __setitem__(self, label: str, value: _T) -> None:
        self.pop(label, None)
        super().__setitem__(label, value)
        if len(self) > KEPT_LABELS:
            del self[next(iter(self))]


class _ProgressBars:
    """A display with one live bar for each label under way.

    A bar that is finished, or stands still when another bar begins, becomes a line above the live bars.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            # What is printed to a file must not go to the terminal.
            redirect_stdout=sys.stdout.isatty(),
        )
        # The time beside each bar is that of its last movement.
        self._bars: dict[str, tuple[TaskID, float]] = {}
        self._latest: dict[str, tuple[float, float]] = _LatestLabels()
        self._lock = threading.Lock()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Move the label's bar, and turn the bar into a line when the work is finished."""
        with self._lock:
            # A repeated update would print a finished bar twice.
            if self._latest.get(label) == (done, total):
                return
            self._latest[label] = (done, total)
            self._move_bar(label, done, total, detail)
            if done >= total:
                self._turn_into_line(label)

    def _move_bar(self, label: str, done: float, total: float, detail: str) -> None:
        """Draw the label's bar; a new bar first ends the bars that stand still."""
        now = self._clock()
        if label in self._bars:
            task_id, _ = self._bars[label]
        else:
            for other in [
                name for name, (_, moved_at) in self._bars.items() if now - moved_at >= STANDSTILL_SECONDS
            ]:
                self._turn_into_line(other)
            self._progress.start()
            task_id = self._progress.add_task(label, total=total, detail=detail)
        self._progress.update(task_id, completed=done, total=total, detail=detail)
        self._bars[label] = (task_id, now)

    def _turn_into_line(self, label: str) -> None:
        """Print the bar as it is now as a line above the live bars, and remove it from them."""
        task_id, _ = self._bars.pop(label)
        bar = [task for task in self._progress.tasks if task.id == task_id]
        self._progress.console.print(self._progress.make_tasks_table(bar))
        self._progress.remove_task(task_id)

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        self._progress.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the live display."""
        self._progress.stop()


class _ProgressLog:
    """A display that logs an event for a label at once, then every few seconds, and when it is finished."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = structlog.get_logger()
        self._latest: dict[str, tuple[float, float]] = _LatestLabels()
        self._logged_at: dict[str, float] = _LatestLabels()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Log the progress, if the work is finished or the label's last event is long enough ago."""
        if self._latest.get(label) == (done, total):
            return
        self._latest[label] = (done, total)
        now = self._clock()
        is_due = now - self._logged_at.get(label, -math.inf) >= LOGGED_PROGRESS_SECONDS
        if is_due or done >= total:
            self._logged_at[label] = now
            self._log.info("progress", label=label, done=done, total=total, detail=detail)

    def message(self, text: str) -> None:
        """Log the text as an event "message"."""
        self._log.info("message", text=text)

    def close(self) -> None:
        """Do nothing, because a log needs no end."""
