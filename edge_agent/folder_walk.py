"""What lies in a class folder: the pictures of a class are those in its folder and in all folders below it.

A link to a folder is followed, unless it leads to a folder that was visited already, or to one in which the
class folder itself lies. What is hidden, and what an operating system keeps for itself, is left out.
"""

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ecavg.common.errors import UsageError, one_line
from ecavg.edge_agent.pictures import IMAGE_FORMATS

# Operating systems and storage devices leave these beside pictures; here in small letters.
_OF_THE_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "@eadir", "__macosx"})
# What comes after the last dot of a name is taken for a suffix only if it is so short.
_MAX_SUFFIX_CHARACTERS = 10


class Item(NamedTuple):
    """A file, or what else may lie in a folder."""

    path: Path
    # What the path leads to, links followed; None if it leads nowhere.
    status: os.stat_result | None

    @property
    def is_folder(self) -> bool:
        """Return True for a folder, and for a link to one."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)

    @property
    def is_picture(self) -> bool:
        """Return True if the file may be an image, and is no pipe or device, which could be read for ever."""
        return self.has_suffix(IMAGE_FORMATS)

    def has_suffix(self, suffixes: Collection[str]) -> bool:
        """Return True if it is a file with one of these suffixes, in small or capital letters."""
        is_file = self.status is not None and stat.S_ISREG(self.status.st_mode)
        return is_file and self.path.suffix.lower() in suffixes

    @property
    def kind(self) -> str:
        """Return what a user calls something that is not read: mostly its suffix."""
        if self.status is None:
            return "out of reach"
        if stat.S_ISDIR(self.status.st_mode):
            return "folder without permission"
        if not stat.S_ISREG(self.status.st_mode):
            return "pipe or device"
        suffix = one_line(self.path.suffix.lower())
        return suffix if 0 < len(suffix) <= _MAX_SUFFIX_CHARACTERS else "other"


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted, and links to folders as well.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_left_out(path.name))


def items_below(folder: Path) -> Iterator[Item]:
    """Yield what lies in a class folder and in all folders below it.

    A folder below that cannot be read is an item itself; others are not.

    Raises:
        OSError: the class folder itself cannot be read.
    """
    top = Item(folder, folder.stat())
    visited = {_identity(each.stat()) for each in (folder, *folder.resolve().parents)}
    to_visit = [top]
    while to_visit:
        current = to_visit.pop()
        try:
            paths = list(current.path.iterdir())
        except OSError:
            if current is top:
                raise
            yield current
            continue
        for item in (look_at(path) for path in paths if not is_left_out(path.name)):
            if not item.is_folder:
                yield item
            elif item.status and (identity := _identity(item.status)) not in visited:
                visited.add(identity)
                to_visit.append(item)


def look_at(path: Path) -> Item:
    """Find what a path leads to."""
    try:
        return Item(path, path.stat())
    except (OSError, ValueError):
        return Item(path, None)


def is_left_out(name: str) -> bool:
    """Return True for what is hidden, as .DS_Store and ._photo.jpg, and for what is no user's own."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def stamp_of_folders(folders: Iterable[Path], suffixes: Collection[str] = tuple(IMAGE_FORMATS)) -> str:
    """Return a value that changes when a file in or below one of these is added, removed or written to.

    No file is opened.
    """
    files: list[bytes] = []
    for folder in folders:
        with suppress(OSError):
            # The folder has just gone, or cannot be read.
            files += [_state_of(item) for item in items_below(folder) if item.has_suffix(suffixes)]
    return hashlib.sha256(b"".join(sorted(files))).hexdigest()


@contextmanager
def named_in_errors() -> Iterator[None]:
    """Turn the error of a folder that cannot be read into UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read data folder {error.filename}: {error.strerror}") from error


def _state_of(item: Item) -> bytes:
    size, written = (item.status.st_size, item.status.st_mtime_ns) if item.status else (0, 0)
    return os.fsencode(item.path) + f"\0{size}\0{written}\0".encode()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
