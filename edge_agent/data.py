"""The data of this agent: what it trains on and may share, and what it measures on.

    --data SOURCE → splits (labels known, files not decoded yet) → this agent's part → two Shards

The held-out part never leaves the device. Where the source has a test split, it is the agent's part of
that split, dealt out as the train split is; otherwise it is about `holdout_fraction` of the agent's examples.

Images of every source come out in the run's shape: resized where height or width differ (the aspect ratio
is not kept), grey repeated into RGB, RGB weighted into grey.

What only some sources need is imported where it is needed: torchvision takes as long as PyTorch.
"""

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import RunConfig
from ecavg.common.dataset import CLASS_NAMES, DATASETS, MISSING, DatasetSpec, Targets
from ecavg.common.errors import UsageError
from ecavg.common.factories import import_factory
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, check_splittable, has_target
from ecavg.common.tasks import kind_of
from ecavg.edge_agent.arrays import (
    Arrays,
    as_labels,
    as_wanted,
    check_arrays,
    is_arrays,
    open_arrays,
    stamp_of_arrays,
)
from ecavg.edge_agent.bundles import BUNDLES, open_bundle
from ecavg.edge_agent.config import FACTORY_PATTERN, check_source, data_root
from ecavg.edge_agent.image_folder import class_folders, list_image_folder, list_splits, stamp_of
from ecavg.edge_agent.labels_file import with_late_targets
from ecavg.edge_agent.not_read import find_not_read
from ecavg.edge_agent.partition import Partition, partition_indices
from ecavg.edge_agent.series import block_of, check_overlap, hold_out_latest
from ecavg.edge_agent.shard_files import input_digests
from ecavg.edge_agent.tables import TableFormat, is_table, names_in, open_table

# The class of each dataset in torchvision.datasets.
_TORCHVISION: Mapping[str, str] = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}

# Of a source that is no table.
NO_TABLE = TableFormat()

# The key of the digests that decide which images are shared.
_SHARING = b"share_data"


class AgentData(NamedTuple):
    """One agent's part of its source, in the run's image shape."""

    # The examples that are trained on, and those without a target; what is shared of them is uploaded.
    train: Shard
    # The examples for the agent's own figures before and after, which never leave the device.
    held_out: Shard
    # How many image files could not be read.
    num_skipped: int
    # The stamp of the image folder that they were read from; see `data_stamp`.
    stamp: str = ""
    # What its image folder holds beside the pictures that are read, in a line for the user.
    not_read: str = ""


class Split(Protocol):
    """The train or the test part of a source."""

    @property
    def targets(self) -> np.ndarray:
        """Return the targets, [N, …]."""

    @property
    def has_pictures(self) -> bool:
        """Return True if the inputs are pictures."""

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Return these examples as the run's, and how many could not be read and are left out.

        Args:
            on_read: called now and then with how many were read, and with their number.
        """


class Source(NamedTuple):
    """The train and the test split of a source; `test` is None if there is none."""

    train: Split
    test: Split | None


def load_agent_data(
    run: RunConfig,
    *,
    source: str | None,
    data_dir: Path | None,
    partition: Partition | None,
    seed_name: str,
    allowed_factories: Collection[str],
    on_read: OnExamples = ignore_examples,
    table: TableFormat = NO_TABLE,
) -> AgentData:
    """Read this agent's part of `source`, or of the run's dataset where that is None.

    Args:
        data_dir: where named datasets are, or are downloaded to; None: the default, see `data_root`.
            With a folder `train` in it, an image folder.
        partition: None: all of the source.
        seed_name: names the random stream that picks the held-out part: the agent's id.
        allowed_factories: the "package.module:factory" names that may be imported.
        on_read: called now and then with how many examples of a split were read, and with their number.
        table: what the columns of a table are.

    Raises:
        UsageError: the source does not exist, cannot be read, does not fit the run, or leaves nothing
            for this agent.
    """
    check_overlap(run, table)
    table = replace(table, missing=run.spec.targets.missing)
    # The stamp is taken first, so that a change while the data are read is noticed.
    stamp = data_stamp(run, source, data_dir)
    folder = _image_folder(run.dataset, source, data_dir)
    not_read = str(find_not_read(folder)) if folder else ""
    opened = open_source(run, source, data_dir=data_dir, allowed_factories=allowed_factories, table=table)
    name = source or run.dataset
    splits = [part for part in opened if part is not None]
    has_labels = kind_of(run.task).has_labels
    targets = [as_labels(part.targets) if has_labels else part.targets for part in splits]
    classes = np.unique(np.concatenate(targets)) if has_labels else np.empty(0)
    if has_labels:
        _check_labels(name, classes, run.spec)

    shards, num_skipped = [], 0
    for part, known in zip(splits, targets, strict=True):
        indices = _own_indices(run, name, known, classes, partition)
        shard, skipped = part.read(indices, run.spec, on_read)
        if not len(shard.targets):
            raise UsageError(f"data source {name}: none of its images can be read; see the warning above")
        shards.append(shard)
        num_skipped += skipped

    if opened.test is None:
        shards = [_take(shards[0], part) for part in _hold_out(run, shards[0], seed_name)]
    train, held_out = shards[0], _with_target(shards[1], run.spec)
    if not len(held_out.targets) or not has_target(train.targets, run.spec.targets).any():
        raise UsageError(f"data source {name}: too few examples have a target, to train on or to hold back")
    return AgentData(train, held_out, num_skipped, stamp, not_read)


def _with_target(shard: Shard, spec: DatasetSpec) -> Shard:
    has_targets = has_target(shard.targets, spec.targets)
    return shard if has_targets.all() else _take(shard, np.flatnonzero(has_targets))


def _hold_out(run: RunConfig, shard: Shard, seed_name: str) -> tuple[np.ndarray, np.ndarray]:
    if overlap := run.spec.inputs.overlap:
        return hold_out_latest(len(shard.targets), run.holdout_fraction, overlap)
    seed = derive_seed(run.seed, "holdout", seed_name)
    return hold_out(shard.inputs, run.holdout_fraction, seed, has_target(shard.targets, run.spec.targets))


def data_stamp(run: RunConfig, source: str | None, data_dir: Path | None) -> str:
    """Return what tells an image folder from an earlier state of it; "" for a source that does not change.

    Raises:
        UsageError: there is no such source.
    """
    if source and _is_in_files(source):
        return stamp_of_arrays(Path(source))
    folder = _image_folder(run.dataset, source, data_dir)
    return stamp_of(folder) if folder else ""


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
    if folder := _image_folder(dataset, source, data_dir):
        return tuple(class_folders(folder / "train"))
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
        return _open_files(Path(source), table, run.class_names, run.spec.targets)
    if folder := _image_folder(run.dataset, source, data_dir):
        return Source(*list_image_folder(folder, run))
    if name in BUNDLES:
        return _in_memory(open_bundle(name))
    if name in _TORCHVISION:
        return _open_dataset(name, data_dir)
    if FACTORY_PATTERN.fullmatch(name):
        return _open_factory(name, allowed_factories)
    raise UsageError(
        f"the run's dataset {name!r} is its own: say where this agent's part is, with --data FOLDER"
    )


def find_source(source: str, data_dir: Path | None, *, table: TableFormat = NO_TABLE) -> Source | None:
    """Find what is on this device of a source that an agent's own configuration names, whatever the run is.

    Returns:
        None for a dataset that is downloaded at the agent's start.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if folder := _image_folder("", source, data_dir):
        return Source(*list_splits(folder, tuple(class_folders(folder / "train")), "white"))
    if source in BUNDLES:
        return _in_memory(open_bundle(source))
    if _is_in_files(source):
        return _open_files(
            Path(source), table, names_in(Path(source), table) if is_table(Path(source)) else ()
        )
    if source not in _TORCHVISION:
        return _open_factory(source, {source})
    try:
        return _read_torchvision(source, data_root(data_dir), download=False)
    except RuntimeError:
        # So torchvision says that the dataset is not there.
        return None
    except Exception as error:
        raise _unreadable(source, data_root(data_dir), error) from error


def _image_folder(dataset: str, source: str | None, data_dir: Path | None) -> Path | None:
    """Return the image folder that is meant; None: something else is meant.

    Raises:
        UsageError: nothing is meant.
    """
    if (source or dataset) in _TORCHVISION:
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
    """Return True if the source is a table, or files of arrays."""
    return not _is_name(source) and (is_table(Path(source)) or is_arrays(Path(source)))


def _open_files(
    path: Path, table: TableFormat, class_names: Sequence[str], described: Targets | None = None
) -> Source:
    if is_table(path):
        return _in_memory(open_table(path, table, class_names))
    train, test = open_arrays(path)
    if described and described.missing:
        targets = as_labels(train.targets) if described.dtype == "int64" else train.targets
        train = Arrays(train.inputs, with_late_targets(path, targets, described, class_names))
    return _in_memory(train, test)


def hold_out(
    inputs: np.ndarray, fraction: float, seed: int, has_targets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold back about `fraction` of the inputs, each by its own values.

    Whatever is added to the data or removed, an input that was uploaded does not become one to measure on,
    nor the other way round; and copies of an input stay together. Where there are so few inputs that chance
    would leave either part empty, one input goes there until there are more.

    Args:
        inputs: [N, …], N of at least 2.
        has_targets: bool [N], the inputs that have a target, of which neither part may be empty; None: all.
            The others are on the side where they stay when their target becomes known.

    Returns:
        Sorted int64 indices of the rest and of the held-out part: disjoint, complete, neither empty.

    Raises:
        UsageError: there are fewer than two inputs.
    """
    some = np.arange(len(inputs)) if has_targets is None else np.flatnonzero(has_targets)
    check_splittable(len(some))
    ranks = input_digests(inputs, repeat(seed.to_bytes(8), len(inputs)))
    is_held_out = ranks < fraction * 2.0**64
    is_held_out[some[ranks[some].argmin()]] = True
    if is_held_out[some].all():
        is_held_out[some[ranks[some].argmax()]] = False
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def choose_shared(inputs: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the examples that the agent shares, about `fraction` of them, each by the values of its input.

    The server has no say in it: whatever the run, its seed and the agent's id, the choice among the same
    inputs is the same. So no restart, no growth and no other run brings a private example out. A smaller
    fraction shares some of the same examples.

    Args:
        inputs: [N, …].

    Returns:
        bool [N].
    """
    if fraction in (0, 1):
        return np.full(len(inputs), bool(fraction))
    return input_digests(inputs, repeat(_SHARING, len(inputs))) < fraction * 2.0**64


@dataclass(frozen=True)
class ArraySplit:
    """A split that is in memory already, or mapped into it; pictures are in their own shape."""

    # The inputs, [N, …].
    inputs: np.ndarray
    # The targets, [N, …].
    targets: np.ndarray

    @property
    def has_pictures(self) -> bool:
        """Return True if the inputs are pictures, uint8 [N, C, H, W]."""
        return self.inputs.dtype == np.uint8 and self.inputs.ndim == 4

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Return these examples as the run's, and how many could not be read and are left out.

        Raises:
            UsageError: the examples are not what the run has.
        """
        inputs, targets = self.inputs[indices], self.targets[indices]
        if spec.is_pictures and self.has_pictures and not spec.targets.shape[1:]:
            inputs = fit(inputs, spec.inputs.shape)
        shard = Shard(as_wanted("inputs", inputs, spec.inputs), as_wanted("targets", targets, spec.targets))
        on_read(len(indices), len(indices))
        return shard, 0


def fit(images: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
    """Bring uint8 [N, C, H, W] into `image_shape`.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); resizing is bilinear with antialiasing.

    Raises:
        UsageError: these channels cannot be turned into those.
    """
    if images.shape[1:] == image_shape:
        return np.ascontiguousarray(images)
    from torchvision.transforms.v2 import functional

    channels, *size = image_shape
    tensor = torch.from_numpy(images)
    if (tensor.shape[1], channels) == (3, 1):
        tensor = functional.rgb_to_grayscale(tensor)
    if list(tensor.shape[2:]) != size:
        tensor = functional.resize(tensor, size, antialias=True)
    if (tensor.shape[1], channels) == (1, 3):
        tensor = tensor.expand(-1, 3, -1, -1)
    if tensor.shape[1] != channels:
        raise UsageError(
            f"the data has images of {tensor.shape[1]} channels, and the run wants {channels}:"
            " set image_shape in the server's [run] table"
        )
    return np.ascontiguousarray(tensor.numpy())


def _in_memory(train: Arrays, test: Arrays | None = None) -> Source:
    """Return the source of arrays."""
    return Source(ArraySplit(*train), ArraySplit(*test) if test else None)


def _open_dataset(name: str, data_dir: Path | None) -> Source:
    root = data_root(data_dir)
    if data_dir is not None and not root.is_dir():
        raise UsageError(f"data folder {root} does not exist: make it, or name the right one with --data-dir")
    try:
        return _read_dataset(name, root)
    # torchvision raises whatever a broken file or network led it to.
    except Exception as error:
        raise _unreadable(name, root, error) from error


def _unreadable(name: str, root: Path, error: Exception) -> UsageError:
    """Return the error for a dataset that cannot be read or downloaded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(
        f"cannot load {name} from {root}: {reason}; give a folder that has it with --data-dir,"
        " or one to download it to"
    )


def _read_torchvision(name: str, root: Path, *, download: bool) -> Source:
    from torchvision import datasets

    dataset = getattr(datasets, _TORCHVISION[name])
    parts = (dataset(root, train=train, download=download) for train in (True, False))
    return Source(*(_to_split(part) for part in parts))


def _read_dataset(name: str, root: Path) -> Source:
    try:
        return _read_torchvision(name, root, download=False)
    except RuntimeError:
        # So torchvision says that the dataset is not there.
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("it is not there, and the folder is not writable") from None
    with _locked(root / ".download.lock"):
        # Several agents on one machine may start together.
        return _read_torchvision(name, root, download=True)


def _to_split(dataset: Any) -> ArraySplit:
    # The shape is [N, H, W] or [N, H, W, C].
    images = np.asarray(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return ArraySplit(images, np.asarray(dataset.targets, np.int64))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_factory(name: str, allowed_factories: Collection[str]) -> Source:
    factory = import_factory(name, allowed_factories)
    try:
        train, test = factory("train"), factory("test")
    except Exception as error:
        # The user's code may raise anything.
        raise UsageError(f"data source {name} failed with {type(error).__name__}: {error}") from error
    return _in_memory(check_arrays(name, train), None if test is None else check_arrays(name, test))


def _check_labels(name: str, classes: np.ndarray, spec: DatasetSpec) -> None:
    num_classes, least = spec.num_classes, MISSING if spec.targets.missing else 0
    strangers = classes[(classes < least) | (classes >= num_classes)]
    if len(strangers):
        raise UsageError(
            f"data source {name} has the label {strangers[0]}, and the run only 0 to {num_classes - 1}:"
            " set num_classes in the server's [run] table"
        )


def _own_indices(
    run: RunConfig, name: str, targets: np.ndarray, classes: np.ndarray, partition: Partition | None
) -> np.ndarray:
    if partition is None:
        return np.arange(len(targets))
    if overlap := run.spec.inputs.overlap:
        return block_of(len(targets), partition, overlap)
    seed = derive_seed(run.seed, "partition")
    parts = partition_indices(targets, partition.count, run.partition_by, seed, classes=classes)
    indices = parts[partition.index - 1]
    if not len(indices):
        raise UsageError(
            f"partition {partition} of {name} is empty: partition_by {run.partition_by} left it none of"
            f" {len(targets)} examples; use fewer partitions, another seed, or a more even partition_by"
        )
    return indices


def _take(shard: Shard, indices: np.ndarray) -> Shard:
    return Shard(shard.inputs[indices], shard.targets[indices])
