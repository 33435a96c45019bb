"""Image folders, DIR/{train,test}/<class>/**: they are listed first, and decoded later as far as needed.

Where targets may be missing, the pictures in DIR/unlabelled are read as well; labels_file.py says how their
classes can be told later.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from ecavg.common.config import Background, RunConfig, class_name
from ecavg.common.errors import UsageError, encodable
from ecavg.edge_agent.file_split import FileSplit, check_has_pictures
from ecavg.edge_agent.folder_walk import folders_in, items_below, named_in_errors, stamp_of_folders
from ecavg.edge_agent.labels_file import labels_of_files, state_of_labels
from ecavg.edge_agent.pictures import IMAGE_FORMATS

# The folder, beside `train`, of pictures whose class is not known.
UNLABELLED = "unlabelled"


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
            f"data folder {folder}: an image folder has pictures{_such_as(folder)} with one class each,"
            " and the run has other data"
        )
    check_has_pictures(f"data folder {folder}", run)
    splits = list_splits(folder, classes_of(folder, run), run.background)
    return (with_unlabelled(folder, splits[0]), splits[1]) if spec.targets.missing else splits


def _such_as(folder: Path) -> str:
    """Return which picture makes the folder an image folder, in words; it may lie among recordings."""
    with suppress(OSError, UsageError):
        items = chain.from_iterable(map(items_below, class_folders(folder / "train").values()))
        return next((f", such as {item.path}," for item in items if item.is_picture), "")
    return ""


def with_unlabelled(folder: Path, train: FileSplit) -> FileSplit:
    """Return the split with the pictures in `folder`/unlabelled, if there are any.

    Raises:
        UsageError: the folder, or the file of labels, cannot be read.
    """
    unlabelled = folder / UNLABELLED
    if not unlabelled.is_dir():
        return train
    with named_in_errors():
        paths = sorted(item.path for item in items_below(unlabelled) if item.is_picture)
    names = [path.relative_to(unlabelled).as_posix() for path in paths]
    labels = labels_of_files(folder, names, train.class_names)
    return replace(train, paths=[*train.paths, *paths], targets=np.concatenate([train.targets, labels]))


def classes_of(folder: Path, run: RunConfig) -> tuple[str, ...]:
    """Return the names of the run's classes or, if it has none, of the class folders in `folder`/train.

    Raises:
        UsageError: the run has another number of classes.
    """
    train = folder / "train"
    class_names = run.class_names or tuple(class_folders(train))
    if len(class_names) != run.spec.num_classes:
        raise UsageError(
            f"data folder {train} has {len(class_names)} class folders, and the run {run.spec.num_classes}"
            " classes: set class_names in the server's [run] table"
        )
    return class_names


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
    with named_in_errors():
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


def stamp_of(folder: Path, suffixes: Collection[str] = tuple(IMAGE_FORMATS)) -> str:
    """Return a value that changes when such a file, or the file of labels, is added, removed or written to.

    No file is opened.
    """
    found = [folder / UNLABELLED]
    for part in (folder / "train", folder / "test"):
        with suppress(OSError):
            # A folder has just gone, or cannot be read.
            found += folders_in(part)
    return stamp_of_folders(found, suffixes) + state_of_labels(folder)


def _list_images(folder: Path, class_names: Sequence[str], background: Background) -> FileSplit:
    paths, labels = labelled_files(folder, class_names, IMAGE_FORMATS)
    return FileSplit(paths, np.array(labels, np.int64), class_names, background)


def labelled_files(
    folder: Path, class_names: Sequence[str], suffixes: Collection[str]
) -> tuple[list[Path], list[int]]:
    """Return the files with these suffixes in the class folders of a folder, and the label of each.

    Raises:
        UsageError: a folder cannot be read, or is of none of these classes, or there are no such files.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[Path] = []
    labels: list[int] = []
    for name, path in class_folders(folder).items():
        if name not in label_of:
            raise UsageError(f"class folder {path} is not one of the run's {len(label_of)} classes")
        with named_in_errors():
            files = sorted(item.path for item in items_below(path) if item.has_suffix(suffixes))
        paths += files
        labels += [label_of[name]] * len(files)
    if not paths:
        noun = "images" if suffixes is IMAGE_FORMATS else "recordings"
        raise UsageError(f"no {noun} ({', '.join(suffixes)}) in the class folders of {folder}")
    return paths, labels
