"""The standard streams of a process, which never raise an error where they cannot be written.

A log on a full disk, a terminal that is closed and a pipe whose reader has gone must not end a process that
others rely on. `prepare` puts files below sys.stdout and sys.stderr that drop what cannot be written, and
count the lost lines. This holds for every writer: the log, the progress bars, Python's warnings, and the
flush at the end of the process.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _DroppingFile(io.FileIO):
    """A descriptor of the process; what cannot be written to it is dropped."""

    num_dropped = 0
    # Why the last lost line was lost; empty if none was lost.
    reason = ""

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write the content, or as much as goes, and return how many bytes need not be written again."""
        try:
            # A descriptor that does not block, and has no room now, makes this None.
            written = super().write(content)
            reason = "its reader does not keep up"
        except OSError as error:
            closed = error.errno == errno.EBADF
            written, reason = None, "it is closed" if closed else error.strerror or str(error)
        if written is not None:
            return written
        self.reason = reason
        self.num_dropped += max(1, bytes(content).count(b"\n"))
        return len(bytes(content))


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
        sys.stdout = _dropping(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _dropping(2, sys.stderr)


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


def _dropping(descriptor: int, stream: TextIO | None) -> TextIO:
    """Return a stream that writes each line at once to the descriptor, and drops what cannot be written.

    Args:
        descriptor: the number of the descriptor.
        stream: Python's stream for the descriptor, which is None if the descriptor was closed.
    """
    file = io.BufferedWriter(_DroppingFile(descriptor, "w", closefd=False))
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True)


def _file_below(stream: TextIO) -> _DroppingFile | None:
    """Return the file that `prepare` has put below the stream, or None if the stream has been replaced."""
    # A progress bar replaces the streams by proxies, which pass everything on.
    stream = getattr(stream, "rich_proxied_file", stream)
    file = getattr(getattr(stream, "buffer", None), "raw", None)
    return file if isinstance(file, _DroppingFile) else None
