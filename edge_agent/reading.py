"""Files that are read by several threads; one that fails is left out, counted and named."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from ecavg.common.agent_progress import OnExamples
from ecavg.common.errors import UsageError, one_line

# Pillow lets go of the interpreter's lock only while it decodes: photos keep several threads busy, and
# with tiny images more than a few only wait for each other.
NUM_READERS = min(4, os.cpu_count() or 1)
# So many files one after the other are the work of one thread.
_BATCH = 64

# So many files are read at most to see that it can be done.
NUM_SAMPLES = 8

# A warning names at most so many reasons.
MAX_NAMED = 5

log = structlog.get_logger()


class Failure(NamedTuple):
    """A file that could not be read."""

    # The place of the file among those that were to be read.
    place: int
    path: Path
    error: Exception

    @property
    def reason(self) -> str:
        """Return why, without the name of the file where the system's error would have it."""
        if isinstance(self.error, OSError) and self.error.strerror:
            return self.error.strerror
        return one_line(str(self.error)) or type(self.error).__name__

    def __str__(self) -> str:
        return f"{one_line(str(self.path))}: {self.reason}"


def read_each(
    paths: Sequence[Path], read_one: Callable[[int, Path], None], on_read: OnExamples
) -> list[Failure]:
    """Have a function read each of the files, and return those for which it raised, in their order.

    Args:
        read_one: gets the place of a file among `paths`, and its path; called by several threads.
        on_read: called now and then with how many were read, and with their number.
    """

    def read(start: int) -> list[Failure]:
        failures = []
        for n in range(start, min(start + _BATCH, len(paths))):
            try:
                read_one(n, paths[n])
            except Exception as error:
                # Decoders raise whatever a broken file led them to.
                failures.append(Failure(n, paths[n], error))
        return failures

    with ThreadPoolExecutor(NUM_READERS) as pool:
        failures = []
        starts = range(0, len(paths), _BATCH)
        for start, failed in zip(starts, pool.map(read, starts), strict=True):
            failures += failed
            on_read(min(start + _BATCH, len(paths)), len(paths))
    return failures


def leave_out(
    failures: Sequence[Failure],
    num_files: int,
    max_skipped: float,
    noun: str,
    more: Callable[[np.ndarray], Mapping[str, object]] = lambda _: {},
) -> np.ndarray:
    """Return which files were read, bool [F]; the others are logged once.

    Args:
        num_files: F.
        max_skipped: the largest fraction of the files that may be left out.
        noun: what a user calls such a file.
        more: returns what else the line in the log says, if there is one, from what is returned here.

    Raises:
        UsageError: more files than that could not be read.
    """
    are_read = np.ones(num_files, bool)
    if not failures:
        return are_read
    if len(failures) > max_skipped * num_files:
        raise UsageError(
            f"{len(failures)} of {num_files} files cannot be read, first {failures[0]}: replace or remove"
            " them, or allow more with --max-bad-rows"
        )
    are_read[[failure.place for failure in failures]] = False
    log.warning(
        f"{noun}s_skipped",
        num_skipped=len(failures),
        first=str(failures[0]),
        reasons=dict(Counter(failure.reason for failure in failures).most_common(MAX_NAMED)),
        **more(are_read),
    )
    return are_read


def check_some(paths: Sequence[Path], read_one: Callable[[Path], object]) -> None:
    """Have a function read a few files from all over; raise UsageError if it raises for one of them."""
    step = max(1, len(paths) // NUM_SAMPLES)
    for path in paths[::step][:NUM_SAMPLES]:
        try:
            read_one(path)
        # Decoders raise whatever a broken file led them to.
        except Exception as error:
            raise UsageError(
                f"{path} cannot be read ({error}): replace or remove it, and others like it;"
                " the agent leaves them out"
            ) from error
