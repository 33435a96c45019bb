"""Image folders, DIR/{train,test}/<class>/**: they are listed first, and decoded later as far as needed.

Where targets may be missing, the pictures in DIR/unlabelled are read as well; labels_file.py says how their
classes can be told later.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import Background, RunConfig, class_name
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import UsageError, encodable, one_line
from ecavg.common.shards import Shard
from ecavg.edge_agent.folder_walk import Item, folders_in, items_below
from ecavg.edge_agent.labels_file import labels_of_files, state_of_labels
from ecavg.edge_agent.pictures import IMAGE_FORMATS, MODES, decode_image, quiet_pillow

# The folder, beside `train`, of pictures whose class is not known.
UNLABELLED = "unlabelled"

# Pillow lets go of the interpreter's lock only while it decodes: photos keep several threads busy, and
# with tiny images more than a few only wait for each other.
NUM_DECODERS = min(4, os.cpu_count() or 1)
_DECODER_BATCH = 64

# A warning names at most so many reasons and classes.
_MAX_NAMED = 5

log = structlog.get_logger()


@dataclass(frozen=True)
class FileSplit:
    """The train or the test part of an image folder."""

    paths: Sequence[Path]
    # The labels, int64 [N]; -1 where the class is not known.
    targets: np.ndarray
    # The names of the labels, label 0 first.
    class_names: Sequence[str]
    background: Background = "white"

    @property
    def has_pictures(self) -> bool:
        """Return True."""
        return True

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Decode these files; files that cannot be read are left out, counted, and logged once."""
        image_shape = spec.inputs.shape
        images = np.empty((len(indices), *image_shape), np.uint8)
        is_read = np.zeros(len(indices), bool)

        def decode(start: int) -> list[_Failure]:
            failures = []
            for n in range(start, min(start + _DECODER_BATCH, len(indices))):
                path = self.paths[indices[n]]
                try:
                    images[n] = decode_image(path, image_shape, self.background)
                    is_read[n] = True
                except Exception as error:
                    # Pillow raises whatever a broken file led it to.
                    failures.append(_Failure(path, error))
            return failures

        with quiet_pillow(), ThreadPoolExecutor(NUM_DECODERS) as pool:
            failures = []
            starts = range(0, len(indices), _DECODER_BATCH)
            for start, failed in zip(starts, pool.map(decode, starts), strict=True):
                failures += failed
                on_read(min(start + _DECODER_BATCH, len(indices)), len(indices))
        labels = self.targets[indices]
        if not failures:
            return Shard(images, labels), 0
        log.warning(
            "images_skipped",
            num_skipped=len(failures),
            first=str(failures[0]),
            reasons=dict(Counter(failure.reason for failure in failures).most_common(_MAX_NAMED)),
            classes_without_images=self._names(np.setdiff1d(labels, labels[is_read])),
        )
        return Shard(images[is_read], labels[is_read]), len(failures)

    def _names(self, labels: np.ndarray) -> list[str]:
        return [self.class_names[label] for label in labels[labels >= 0][:_MAX_NAMED]]


class _Failure(NamedTuple):
    """A file that could not be read."""

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


def list_image_folder(folder: Path, run: RunConfig) -> tuple[FileSplit, FileSplit | None]:
    """Find the files and labels of `folder`/train and, where there is one, `folder`/test.

    A class folder's label is its place among the run's class_names or, where there are none, among the
    sorted names of the class folders in `folder`/train.

    Raises:
        UsageError: a folder is missing, cannot be read, or has no images, or the class folders are not
            the run's classes.
    """
    spec = run.spec
    if not spec.is_pictures or spec.targets.shape:
        raise UsageError(
            f"data folder {folder}: an image folder has pictures with one class each,"
            " and the run has other data"
        )
    if spec.inputs.shape[0] not in MODES:
        raise UsageError(
            f"data folder {folder}: image folders give 1 or 3 channels, and the run's image_shape asks for"
            f" {spec.inputs.shape[0]}"
        )
    train = folder / "train"
    class_names = run.class_names or tuple(class_folders(train))
    if len(class_names) != spec.num_classes:
        raise UsageError(
            f"data folder {train} has {len(class_names)} class folders, and the run {spec.num_classes}"
            " classes: set class_names in the server's [run] table"
        )
    splits = list_splits(folder, class_names, run.background)
    return (_with_unlabelled(folder, splits[0]), splits[1]) if spec.targets.missing else splits


def _with_unlabelled(folder: Path, train: FileSplit) -> FileSplit:
    """Return the split with the pictures in `folder`/unlabelled, if there are any."""
    unlabelled = folder / UNLABELLED
    if not unlabelled.is_dir():
        return train
    with _named_in_errors():
        paths = sorted(item.path for item in items_below(unlabelled) if item.is_picture)
    names = [path.relative_to(unlabelled).as_posix() for path in paths]
    labels = labels_of_files(folder, names, train.class_names)
    return replace(train, paths=[*train.paths, *paths], targets=np.concatenate([train.targets, labels]))


def list_splits(
    folder: Path, class_names: Sequence[str], background: Background
) -> tuple[FileSplit, FileSplit | None]:
    """Find the files and labels of `folder`/train and, where there is one, `folder`/test.

    Raises:
        UsageError: a folder cannot be read, or has no images, or is of none of these classes.
    """
    test = folder / "test"
    return (
        _list_images(folder / "train", class_names, background),
        _list_images(test, class_names, background) if test.is_dir() else None,
    )


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders in `folder` by the names of their classes, sorted by name.

    Raises:
        UsageError: there are none, or they cannot be read, or a name is no name of a class.
    """
    named: dict[str, Path] = {}
    with _named_in_errors():
        found = folders_in(folder) if folder.is_dir() else []
    for path in found:
        name = _class_of(path)
        if other := named.get(name):
            raise UsageError(f"class folders {other} and {path} have the same name: rename one")
        named[name] = path
    if not named:
        raise UsageError(f"no class folders in {folder}: lay the images out as {folder}/<class>/*")
    return dict(sorted(named.items()))


def _class_of(folder: Path) -> str:
    """Return the name of the class that a class folder holds, or raise UsageError."""
    if folder.name != encodable(folder.name):
        raise UsageError(f"class folder {folder} has a name that is not UTF-8: rename it")
    try:
        return class_name(folder.name)
    except ValueError as error:
        raise UsageError(f"class folder {folder}: its name {error}: rename it") from error


@contextmanager
def _named_in_errors() -> Iterator[None]:
    """Turn the error of a folder that cannot be read into UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read data folder {error.filename}: {error.strerror}") from error


def stamp_of(folder: Path) -> str:
    """Return a value that changes when a picture or the labels of `folder` are added, removed or written to.

    No file is opened.
    """
    files: list[bytes] = []
    for part in (folder / "train", folder / "test"):
        with suppress(OSError):
            # A folder has just gone, or cannot be read.
            for class_folder in folders_in(part):
                files += _states_below(class_folder)
    with suppress(OSError):
        files += _states_below(folder / UNLABELLED)
    files.append(state_of_labels(folder).encode())
    return hashlib.sha256(b"".join(sorted(files))).hexdigest()


def _states_below(folder: Path) -> list[bytes]:
    return [_state_of(item) for item in items_below(folder) if item.is_picture]


def _state_of(item: Item) -> bytes:
    size, written = (item.status.st_size, item.status.st_mtime_ns) if item.status else (0, 0)
    return os.fsencode(item.path) + f"\0{size}\0{written}\0".encode()


def _list_images(folder: Path, class_names: Sequence[str], background: Background) -> FileSplit:
    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[Path] = []
    labels: list[int] = []
    for name, path in class_folders(folder).items():
        if name not in label_of:
            raise UsageError(f"class folder {path} is not one of the run's {len(label_of)} classes")
        with _named_in_errors():
            images = sorted(item.path for item in items_below(path) if item.is_picture)
        paths += images
        labels += [label_of[name]] * len(images)
    if not paths:
        raise UsageError(f"no images ({', '.join(IMAGE_FORMATS)}) in the class folders of {folder}")
    return FileSplit(paths, np.array(labels, np.int64), class_names, background)
