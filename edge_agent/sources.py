"""The sources of examples: what `--data`, or the run's dataset, means on this device."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ecavg.common.config import RunConfig
from ecavg.common.dataset import CLASS_NAMES, DATASETS
from ecavg.common.errors import UsageError
from ecavg.common.factories import import_factory
from ecavg.edge_agent.arrays import (
    Arrays,
    as_labels,
    check_arrays,
    is_arrays,
    open_arrays,
    stamp_of_arrays,
)
from ecavg.edge_agent.bundles import BUNDLES, open_bundle
from ecavg.edge_agent.columns import is_table
from ecavg.edge_agent.config import FACTORY_PATTERN, check_source, data_root
from ecavg.edge_agent.downloads import TORCHVISION, find_dataset, open_dataset
from ecavg.edge_agent.file_split import check_has_pictures
from ecavg.edge_agent.image_folder import (
    UNLABELLED,
    class_folders,
    list_image_folder,
    list_splits,
    stamp_of,
    with_unlabelled,
)
from ecavg.edge_agent.labels_file import with_late_targets
from ecavg.edge_agent.masks import FOLDERS, is_mask_folder, open_mask_folder, stamp_of_masks
from ecavg.edge_agent.not_read import find_not_read
from ecavg.edge_agent.picture_table import has_pictures, picture_rows
from ecavg.edge_agent.pictures import IMAGE_FORMATS
from ecavg.edge_agent.recordings import RECORDINGS, has_recordings, open_recordings
from ecavg.edge_agent.splits import Source, in_memory
from ecavg.edge_agent.tables import TableFormat, examples_of, names_in, read_table

# Of a source that is no table.
NO_TABLE = TableFormat()


class _ClassFolders(NamedTuple):
    """A folder with class folders, and which files of them are read."""

    folder: Path
    suffixes: Collection[str]
    # What a user calls such a file.
    noun: str


def data_stamp(run: RunConfig, source: str | None, data_dir: Path | None) -> str:
    """Return what tells the files of a source from an earlier state of them; "" for one that does not change.

    Raises:
        UsageError: there is no such source.
    """
    if found := _class_folders_of(run.dataset, source, data_dir):
        return stamp_of(found.folder, found.suffixes)
    if source is None or not _is_in_files(source):
        return ""
    path = Path(source)
    return stamp_of_masks(path) if is_mask_folder(path) else stamp_of_arrays(path)


def not_read_of(run: RunConfig, source: str | None, data_dir: Path | None) -> str:
    """Return what is not read of a source of folders, in a line for the user; "" if all of it is.

    Raises:
        UsageError: there is no such source.
    """
    if source and not _is_name(source) and is_mask_folder(Path(source)):
        return str(find_not_read(Path(source), others=[Path(source, name) for name in FOLDERS]))
    found = _class_folders_of(run.dataset, source, data_dir)
    if found is None:
        return ""
    unlabelled = found.folder / UNLABELLED
    if found.suffixes == RECORDINGS:
        why = "recordings need a class"
    else:
        why = "" if run.spec.targets.missing else "the server's [run.targets] table has no missing = true"
    files = str(find_not_read(*found, others=() if why else [unlabelled]))
    folder = f"{UNLABELLED} is not read, because {why}" if why and unlabelled.is_dir() else ""
    return "; ".join(filter(None, (files, folder)))


def class_names_of(
    source: str | None,
    data_dir: Path | None,
    run: RunConfig | None = None,
    *,
    table: TableFormat = NO_TABLE,
) -> tuple[str, ...]:
    """Return the names of the classes that the labels of `source`, or else of the run's dataset, stand for.

    Args:
        run: None: the run is not known yet, and only what the source itself says counts.

    Returns:
        The names in NFC; none where the names are not known.

    Raises:
        UsageError: there is no such source, or it is an image folder that cannot be read.
    """
    if source and not _is_name(source) and is_table(Path(source)):
        return names_in(Path(source), table)
    dataset = run.dataset if run else ""
    if found := _class_folders_of(dataset, source, data_dir):
        return tuple(class_folders(found.folder / "train"))
    names = CLASS_NAMES.get(source or dataset, ())
    return names if run and len(names) == run.spec.num_classes else ()


def open_source(
    run: RunConfig,
    source: str | None,
    *,
    data_dir: Path | None,
    allowed_factories: Collection[str],
    table: TableFormat = NO_TABLE,
) -> Source:
    """Find what `source`, or the run's dataset where that is None, means.

    A folder is read only where this agent's own configuration names it: what a server sends is never
    taken for a path.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    name = source or run.dataset
    if source and _is_in_files(source):
        return _open_files(Path(source), table, run.class_names, run)
    if folder := _image_folder_of(run.dataset, source, data_dir):
        return Source(*list_image_folder(folder, run))
    if name in BUNDLES:
        return in_memory(open_bundle(name))
    if name in TORCHVISION:
        return open_dataset(name, data_dir)
    if FACTORY_PATTERN.fullmatch(name):
        return _open_factory(name, allowed_factories)
    raise UsageError(
        f"the run's dataset {name!r} is its own: say where this agent's part is, with --data FOLDER"
    )


def find_source(source: str, data_dir: Path | None, *, table: TableFormat = NO_TABLE) -> Source | None:
    """Find what is on this device of a source that an agent's own configuration names, whatever the run is.

    Targets may be missing, because they may in the run.

    Returns:
        None for a dataset that is downloaded at the agent's start.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if folder := _image_folder_of("", source, data_dir):
        train, test = list_splits(folder, tuple(class_folders(folder / "train")), "white")
        return Source(with_unlabelled(folder, train), test)
    if source in BUNDLES:
        return in_memory(open_bundle(source))
    if _is_in_files(source):
        names = names_in(Path(source), table) if is_table(Path(source)) else ()
        return _open_files(Path(source), replace(table, missing=True), names)
    if source in TORCHVISION:
        return find_dataset(source, data_dir)
    return _open_factory(source, {source})


def _image_folder_of(dataset: str, source: str | None, data_dir: Path | None) -> Path | None:
    """Return the image folder that is meant; None: something else is meant.

    Raises:
        UsageError: nothing is meant.
    """
    if (source or dataset) in TORCHVISION:
        root = data_root(data_dir)
        return root if (root / "train").is_dir() else None
    if source is None or _is_name(source):
        return None
    check_source(source)
    return None if _is_in_files(source) else Path(source)


def _is_name(source: str) -> bool:
    """Return True if the source is a dataset or code of the user's, and no path."""
    return source in DATASETS or FACTORY_PATTERN.fullmatch(source) is not None


def _is_in_files(source: str) -> bool:
    """Return True if the source is a table, files of arrays, pictures with masks, or recordings."""
    path = Path(source)
    kinds = (is_table, is_arrays, is_mask_folder, has_recordings)
    return not _is_name(source) and any(is_kind(path) for is_kind in kinds)


def _class_folders_of(dataset: str, source: str | None, data_dir: Path | None) -> _ClassFolders | None:
    """Return where the source has class folders; None: it has none.

    Raises:
        UsageError: there is no such source.
    """
    if source and not _is_name(source) and has_recordings(Path(source)):
        return _ClassFolders(Path(source), RECORDINGS, "recording")
    folder = _image_folder_of(dataset, source, data_dir)
    return _ClassFolders(folder, tuple(IMAGE_FORMATS), "image") if folder else None


def _open_files(
    path: Path, table: TableFormat, class_names: Sequence[str], run: RunConfig | None = None
) -> Source:
    if is_mask_folder(path):
        return open_mask_folder(path, table.max_bad_rows, run)
    if has_recordings(path):
        return open_recordings(path, table, run)
    if not is_table(path):
        train, test = open_arrays(path)
        return in_memory(_told_late(path, train, class_names, run) if run else train, test)
    columns = read_table(path, table)
    if not has_pictures(columns, table):
        return in_memory(examples_of(columns, table, class_names))
    if run:
        check_has_pictures(f"data source {path}", run)
    return Source(picture_rows(columns, table, class_names, run.background if run else "white"), None)


def _told_late(path: Path, train: Arrays, class_names: Sequence[str], run: RunConfig) -> Arrays:
    """Return the arrays with the targets that a file beside them tells, where the run's may be missing."""
    described = run.spec.targets
    if not described.missing:
        return train
    targets = as_labels(train.targets) if described.dtype == "int64" else train.targets
    return Arrays(train.inputs, with_late_targets(path, targets, described, class_names))


def _open_factory(name: str, allowed_factories: Collection[str]) -> Source:
    factory = import_factory(name, allowed_factories)
    try:
        train, test = factory("train"), factory("test")
    except Exception as error:
        # The user's code may raise anything.
        raise UsageError(f"data source {name} failed with {type(error).__name__}: {error}") from error
    return in_memory(check_arrays(name, train), None if test is None else check_arrays(name, test))
