"""The progress display of a process: bars at a terminal, events in a log."""

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import structlog
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ecavg.common.errors import one_line
from ecavg.common.pace import Pace

# Two "progress" events of one label are at least so far apart.
LOGGED_PROGRESS_SECONDS = 5.0
# A long-running process uses ever new labels. Only the state of the latest labels is kept.
KEPT_LABELS = 32
# When a new bar begins, a bar that has not moved for this time becomes a finished line.
STANDSTILL_SECONDS = 1.0

# From this width on a terminal has room for longer bars; the figures beside them fit into 80 characters.
WIDE_CHARACTERS = 100
# Work that is shown only where it is long is shown after this time.
LONG_SECONDS = 1.0

_T = TypeVar("_T")


class ProgressDisplay(Protocol):
    """A display of the progress of each labelled piece of work, at the terminal or in the log.

    Any thread may call the methods.
    """

    def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "steps") -> None:
        """Show that `done` of `total` units of `label` are finished, and beside them the text `detail`.

        The work is finished when `done` equals `total`.
        """

    def message(self, text: str) -> None:
        """Print one line that stays on the terminal."""

    def close(self) -> None:
        """Restore the terminal; a second call does nothing."""


def progress_display(*, has_bars: bool = True) -> ProgressDisplay:
    """Return a display with bars if stderr is a terminal, otherwise one that logs "progress" events.

    Args:
        has_bars: False for events at a terminal as well.
    """
    return _ProgressBars() if has_bars and sys.stderr.isatty() else _ProgressLog()


class LongWork:
    """Work that mostly takes no time, whose bar is shown only where it does.

    Args:
        clock: returns seconds that never decrease.
    """

    def __init__(
        self, display: ProgressDisplay, label: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._display = display
        self._label = label
        self._clock = clock
        # When the present piece of work began, by its first update; None: none has.
        self._began_at: float | None = None

    def update(self, done: int, total: int) -> None:
        """Show that so many of `total` examples are done, once the work has lasted for a while."""
        now = self._clock()
        if self._began_at is None:
            self._began_at = now
        if now - self._began_at >= LONG_SECONDS:
            self._display.update(self._label, done, total, unit="examples")
        if done >= total:
            self._began_at = None


class _LatestLabels(dict[str, _T]):
    """A dict that keeps only the KEPT_LABELS labels that were set last."""

    def __setitem__(self, label: str, value: _T) -> None:
        self.pop(label, None)
        super().__setitem__(label, value)
        if len(self) > KEPT_LABELS:
            del self[next(iter(self))]


class _RateColumn(ProgressColumn):
    """The column of a bar's units a second."""

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing until it is known."""
        speed = task.finished_speed or task.speed
        return Text(rate_text(speed, task.fields["unit"]) if speed else "", style="progress.data.speed")


def rate_text(rate: float, unit: str) -> str:
    """Return a rate for people, in units a second: "1.2 MB/s", "35 steps/s" or "0.25 steps/s"."""
    if unit == "bytes":
        return f"{decimal(round(rate))}/s"
    return f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class _ProgressBars:
    """A display with one live bar for each label under way.

    A bar that is finished, or stands still when another bar begins, becomes a line above the live bars.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if console.width >= WIDE_CHARACTERS else 8),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            _RateColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            # What is printed to a file must not go to the terminal.
            redirect_stdout=sys.stdout.isatty(),
        )
        # The time beside each bar is that of its last movement.
        self._bars: dict[str, tuple[TaskID, float]] = {}
        self._latest: dict[str, tuple[float, float]] = _LatestLabels()
        self._lock = threading.Lock()

    def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "steps") -> None:
        """Move the label's bar, and turn the bar into a line when the work is finished."""
        with self._lock:
            # A repeated update would print a finished bar twice.
            if self._latest.get(label) == (done, total):
                return
            self._latest[label] = (done, total)
            self._move_bar(label, done, total, detail, unit)
            if done >= total:
                self._turn_into_line(label)

    def _move_bar(self, label: str, done: float, total: float, detail: str, unit: str) -> None:
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
            task_id = self._progress.add_task(label, total=total, detail=detail, unit=unit)
        self._progress.update(task_id, completed=done, total=total, detail=detail, unit=unit)
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
        self._paces: dict[str, Pace] = _LatestLabels()

    def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "steps") -> None:
        """Log the progress, if the work is finished or the label's last event is long enough ago."""
        if self._latest.get(label) == (done, total):
            return
        self._latest[label] = (done, total)
        now = self._clock()
        pace = self._paces.get(label) or Pace()
        self._paces[label] = pace
        pace.note(done, now)
        is_due = now - self._logged_at.get(label, -math.inf) >= LOGGED_PROGRESS_SECONDS
        if is_due or done >= total:
            self._logged_at[label] = now
            self._log.info(
                "progress",
                label=label,
                done=done,
                total=total,
                unit=unit,
                rate=_rounded(pace.rate(now)),
                seconds_left=_rounded(pace.seconds_left(total, now)),
                detail=detail,
            )

    def message(self, text: str) -> None:
        """Log the text as an event "message"."""
        self._log.info("message", text=text)

    def close(self) -> None:
        """Do nothing, because a log needs no end."""


def _rounded(value: float | None) -> float | None:
    """Return a figure with three digits; None stays None."""
    return None if value is None else float(f"{value:.3g}")
