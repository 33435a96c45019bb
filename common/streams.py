"""The standard streams of a process, which never raise an error where they cannot be written.

A log on a full disk, a terminal that is closed and a pipe whose reader has gone must not end a process that
others rely on. `prepare` puts files below sys.stdout and sys.stderr that drop what cannot be written, and
count the lost lines. This holds for every writer: the log, the progress bars, Python's warnings, and the
flush at the end of the process.
"""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


# The log waits so long for a reader that does not keep up. From then on it loses lines until there is room.
PATIENCE_SECONDS = 1.0
# A pipe that has any room takes so many bytes without waiting (pipe(7): PIPE_BUF).
_PIPE_BYTES = 4096


class _DroppingFile(io.FileIO):
    """A descriptor of the process; what cannot be written to it is dropped.

    Args:
        descriptor: the number of the descriptor, which stays open.
        patience: the seconds to wait for a pipe or a terminal that takes nothing; None for ever.
    """

    num_dropped = 0
    # Why the last lost line was lost; empty if none was lost.
    reason = ""

    def __init__(self, descriptor: int, patience: float | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._patience = self._patience_now = patience

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write the content or its beginning, and return how many bytes need not be written again."""
        content = bytes(content)
        written, reason = None, "its reader does not keep up"
        if self._has_room():
            try:
                # A descriptor that does not block, and has no room now, makes this None.
                written = super().write(content[:_PIPE_BYTES])
            except OSError as error:
                reason = "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)
        if written is not None:
            return written
        self.reason = reason
        self.num_dropped += content.count(b"\n")
        return len(content)

    def _has_room(self) -> bool:
        """Wait until the descriptor takes a few bytes, or fails; return False if that takes too long."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        has_room = bool(poll.poll(None if self._patience_now is None else 1000 * self._patience_now))
        if self._patience is not None:
            self._patience_now = self._patience if has_room else 0.0
        return has_room


def prepare() -> None:
    """Make this process independent of what becomes of its standard streams; the first act of a command.

    A descriptor that is closed is opened: otherwise the next file or socket would get its number, and a
    library that prints would write into that. The streams show a character that their encoding does not
    have as an escape sequence.
    """
    for descriptor in (0, 1, 2):
        _keep_number(descriptor)
    # A stream that has been replaced, as in a test, is left to whoever has replaced it.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _dropping(1, sys.stdout, patience=None)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _dropping(2, sys.stderr, patience=PATIENCE_SECONDS)


def lost_by(stream: TextIO) -> str:
    """Return why the stream has lost a line since the last call of this function; empty if it has not."""
    file = _file_below(stream)
    if file is None:
        return ""
    reason, file.reason = file.reason, ""
    return reason


def num_dropped() -> int:
    """Return how many lines this process could not write to its standard streams."""
    files = (_file_below(stream) for stream in (sys.stdout, sys.stderr))
    return sum(file.num_dropped for file in files if file)


def _keep_number(descriptor: int) -> None:
    """Open /dev/null under the number of a descriptor that is closed.

    It is opened for reading alone. Writing to it fails as before, so that lost lines are still counted.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        else:
            os.set_inheritable(null, True)


def _dropping(descriptor: int, stream: TextIO | None, patience: float | None) -> TextIO:
    """Return a stream that writes each line at once to the descriptor, and drops what cannot be written.

    Args:
        descriptor: the number of the descriptor.
        stream: Python's stream for the descriptor, which is None if the descriptor was closed.
        patience: as for `_DroppingFile`.
    """
    file = io.BufferedWriter(_DroppingFile(descriptor, patience))
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True)


def _file_below(stream: TextIO) -> _DroppingFile | None:
    """Return the file that `prepare` has put below the stream, or None if the stream has been replaced."""
    # A progress bar replaces the streams by proxies, which pass everything on.
    stream = getattr(stream, "rich_proxied_file", stream)
    file = getattr(getattr(stream, "buffer", None), "raw", None)
    return file if isinstance(file, _DroppingFile) else None
