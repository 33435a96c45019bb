"""The command `doctor` of both sides: checks that change nothing, each of which says ok or what to do."""

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path

from ecavg.common import cli, clock
from ecavg.common.errors import RunError, UsageError

# A check returns what is well, and raises an error that says what is wrong and what to do.
Check = Callable[[], str]

# With less room on its disk than this, a process would soon have to wait for room.
MIN_FREE_BYTES = 10**9
# A certificate that ends sooner than this is told as wrong, if nothing renews it.
FEW_DAYS = 14

_PACKAGES = ("ecavg", "torch", "torchvision", "grpcio", "cryptography", "numpy")


def examine(checks: Mapping[str, Check]) -> int:
    """Do all checks, print a line about each, and return 0 if all is well, else 1.

    Raises:
        RunError: stdout cannot be written.
    """
    outcomes = [_is_well(name, check) for name, check in checks.items()]
    return 0 if all(outcomes) else 1


def _is_well(name: str, check: Check) -> bool:
    """Do one check and print its line; return True if all is well."""
    try:
        line = f"ok     {name}: {check()}"
    # A check meets other people's files, networks and code, and the checks after it should be done as well.
    except Exception as error:
        cli.print_result(f"wrong  {name}: {cli.describe(error)}")
        return False
    cli.print_result(line)
    return True


def versions() -> str:
    """Return the versions of this program, of Python and of the libraries that matter most.

    Raises:
        RunError: a library is not installed.
    """
    try:
        installed = [f"{package} {metadata.version(package)}" for package in _PACKAGES]
    except metadata.PackageNotFoundError as error:
        raise RunError(f"{error.name} is not installed: install this program again") from error
    return f"{', '.join(installed)}, Python {platform.python_version()}"


def writable(folder: Path) -> str:
    """Return that the state directory can be written, or that it can be made.

    Raises:
        UsageError: it cannot.
    """
    try:
        place = _nearest(folder)
        # This file has no name on most file systems, and on others it is removed at once.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): make it writable, or choose another --state-dir"
        ) from error
    return f"{folder} can be written" if place == folder else f"{folder} is made at the first start"


def disk(folder: Path) -> str:
    """Return how much room the disk of the state directory has.

    Raises:
        UsageError: the disk has too little room.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    room = f"{free / 1e9:.1f} GB are free for {folder}"
    if free < MIN_FREE_BYTES:
        raise UsageError(f"only {room}: make room, or choose a --state-dir on another disk")
    return room


def read_clock() -> str:
    """Return what this machine's clock says.

    Raises:
        UsageError: the clock is evidently wrong.
    """
    if doubt := clock.doubt(time.time(), 0.0):
        raise UsageError(doubt)
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def days_until(end: datetime) -> int:
    """Return how many whole days are left by this machine's clock; below 0: it is over."""
    return int((end.timestamp() - time.time()) // 86400)
