"""The lock of a state directory: one server, or any number of checks, at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.errors import UsageError


class InUseError(UsageError):
    """Another process has the state directory."""


@contextmanager
def locked(state_dir: StateDir) -> Iterator[None]:
    """Hold an existing state directory for a server.

    Raises:
        InUseError: another process has it.
    """
    # The kernel lets go of the lock when the process ends, however it ends; the text only tells who it was.
    with state_dir.lock.open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"process {_holder(file)} uses state directory {state_dir}:"
                " stop it, or choose another --state-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def unused(state_dir: StateDir) -> Iterator[None]:
    """Keep servers away from a state directory, without a change to it.

    Raises:
        UsageError: a server is at work there, or none ever was.
    """
    if not state_dir.lock.is_file() or not state_dir.blobs.is_dir():
        raise UsageError(f"{state_dir} is no state directory: name the one that cloud-server has")
    with state_dir.lock.open(encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"process {_written_in(file)} uses state directory {state_dir}: stop it first"
            ) from None
        yield


def _holder(file: TextIO) -> str:
    """Return who has the lock, as far as that can be told.

    A server has left its name in the file. `cloud-server check` may not, because it changes nothing: the
    kernel knows it as the only one that shares the lock
    (https://man7.org/linux/man-pages/man5/proc_locks.5.html).
    """
    status = os.fstat(file.fileno())
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    # Linux alone has this file.
    with suppress(OSError):
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            match line.split():
                case [_, "FLOCK", _, "READ", pid, where, *_] if where == f"{device}:{status.st_ino}":
                    return f"{pid} (cloud-server check)"
    return _written_in(file)


def _written_in(file: TextIO) -> str:
    file.seek(0)
    return " on ".join(file.read().split())
