"""What class folders hold beside the files that are read: a user who knows of it can mend it."""

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from ecavg.common.errors import one_line
from ecavg.edge_agent.folder_walk import Item, folders_in, is_left_out, items_below, look_at
from ecavg.edge_agent.pictures import IMAGE_FORMATS

# So many suffixes and folders are named.
MAX_NAMED = 5

log = structlog.get_logger()


@dataclass
class NotRead:
    """What is not read of class folders; all names are printable, and folders read "train/cat"."""

    # The number of files for each suffix, and for each class folder.
    suffixes: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)
    # The class folders without anything to read.
    without_images: list[str] = field(default_factory=list)
    # What a user calls what is read.
    noun: str = "image"

    def add(self, folder: str, item: Item) -> None:
        """Count a file in a folder."""
        self.suffixes[item.kind] += 1
        self.folders[folder] += 1

    def __str__(self) -> str:
        """Return a line for the user; empty if there is nothing to say."""
        parts = []
        if num_files := self.suffixes.total():
            suffixes = _listed([f"{suffix} {count}" for suffix, count in self.suffixes.most_common()])
            folders = _listed([f"{count} in {folder}" for folder, count in self.folders.most_common()])
            parts.append(f"files not read: {num_files} ({suffixes}), of them {folders}")
        if self.without_images:
            parts.append(f"no {self.noun} to read in {_listed(self.without_images)}")
        return "; ".join(parts)


def find_not_read(
    folder: Path,
    suffixes: Collection[str] = tuple(IMAGE_FORMATS),
    noun: str = "image",
    others: Sequence[Path] = (),
) -> NotRead:
    """Find what is not read of `folder`/train, `folder`/test and others, and log it in one warning.

    What cannot be listed at all is not told of here: reading the pictures fails for it.

    Args:
        suffixes: those of the files that are read.
        noun: what a user calls such a file.
        others: folders of such files beside `folder`/train.
    """
    found = NotRead(noun=noun)
    for part in (folder / "train", folder / "test"):
        with suppress(OSError):
            _add_files_beside(part, found)
            for class_folder in folders_in(part):
                if not _add_files_in(class_folder, found, suffixes):
                    found.without_images.append(_short(class_folder))
    for other in others:
        with suppress(OSError):
            _add_files_in(other, found, suffixes)
    if str(found):
        log.warning(
            "files_not_read",
            num_files=found.suffixes.total(),
            suffixes=dict(found.suffixes.most_common(MAX_NAMED)),
            folders=dict(found.folders.most_common(MAX_NAMED)),
            without_images=found.without_images[:MAX_NAMED],
        )
    return found


def _add_files_beside(part: Path, found: NotRead) -> None:
    """Count the files that lie beside the class folders."""
    for item in map(look_at, part.iterdir()):
        if not item.is_folder and not is_left_out(item.path.name):
            found.add(part.name, item)


def _add_files_in(folder: Path, found: NotRead, suffixes: Collection[str]) -> int:
    """Count the files that are not read, and return how many are."""
    num_read = 0
    for item in items_below(folder):
        if item.has_suffix(suffixes):
            num_read += 1
        else:
            found.add(_short(folder), item)
    return num_read


def _short(folder: Path) -> str:
    return one_line(f"{folder.parent.name}/{folder.name}")


def _listed(words: Sequence[str]) -> str:
    more = len(words) - MAX_NAMED
    return ", ".join(words[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
