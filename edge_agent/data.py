"""The data of this agent: what it trains on and may share, and what it measures on.

    --data SOURCE → splits (labels known, files not decoded yet) → this agent's part → two Shards

The held-out part never leaves the device. Where the source has a test split, it is the agent's part of
that split, dealt out as the train split is; otherwise it is about `holdout_fraction` of the agent's examples.
"""

from collections.abc import Collection
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import RunConfig
from ecavg.common.dataset import MISSING, DatasetSpec
from ecavg.common.errors import UsageError
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, check_splittable, has_target
from ecavg.common.tasks import kind_of
from ecavg.edge_agent.arrays import as_labels
from ecavg.edge_agent.partition import Partition, partition_indices
from ecavg.edge_agent.series import block_of, check_overlap, hold_out_latest
from ecavg.edge_agent.shard_files import input_digests
from ecavg.edge_agent.sources import NO_TABLE, data_stamp, not_read_of, open_source
from ecavg.edge_agent.splits import Source, Split, is_held_out
from ecavg.edge_agent.tables import TableFormat

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
    # What its class folders hold beside the files that are read, in a line for the user.
    not_read: str = ""


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
    num_classes = run.spec.num_classes if kind_of(run.task).has_labels else None
    table = replace(table, missing=run.spec.targets.missing, num_classes=num_classes)
    # The stamp is taken first, so that a change while the data are read is noticed.
    stamp = data_stamp(run, source, data_dir)
    not_read = not_read_of(run, source, data_dir)
    opened = open_source(run, source, data_dir=data_dir, allowed_factories=allowed_factories, table=table)
    check_overlap(run, table)
    name = source or run.dataset
    shards, num_skipped = _read_parts(run, name, opened, partition, on_read)
    if opened.test is None:
        shards = [_take(shards[0], part) for part in _hold_out(run, shards[0], seed_name)]
    for shard, purpose in zip(shards, ("to train on", "held back to measure models on"), strict=True):
        if not has_target(shard.targets, run.spec.targets).any():
            num_examples = len(shard.targets)
            raise UsageError(f"data source {name}: none of {num_examples} examples {purpose} has a target")
    return AgentData(shards[0], _with_target(shards[1], run.spec), num_skipped, stamp, not_read)


def _read_parts(
    run: RunConfig, name: str, source: Source, partition: Partition | None, on_read: OnExamples
) -> tuple[list[Shard], int]:
    """Return this agent's part of the train split and, if there is one, of the test split.

    Args:
        name: what the user calls the source.

    Returns:
        The parts, and how many files of them could not be read.

    Raises:
        UsageError: a part cannot be read, is empty, or does not fit the run.
    """
    splits = [split for split in source if split is not None]
    targets, classes = [split.targets for split in splits], np.empty(0)
    if kind_of(run.task).has_labels:
        targets = [as_labels(each) for each in targets]
        classes = np.unique(np.concatenate(targets))
        for each in targets:
            _check_labels(name, each, run.spec)
    shards, num_skipped = [], 0
    for split, known in zip(splits, targets, strict=True):
        indices = _own_indices(run, name, split, known, classes, partition)
        shard, skipped = split.read(indices, run.spec, on_read)
        if not len(shard.targets):
            raise UsageError(
                f"data source {name}: none of its {split.noun}s can be read; see the warning above"
            )
        shards.append(shard)
        num_skipped += skipped
    return shards, num_skipped


def _with_target(shard: Shard, spec: DatasetSpec) -> Shard:
    has_targets = has_target(shard.targets, spec.targets)
    return shard if has_targets.all() else _take(shard, np.flatnonzero(has_targets))


def _hold_out(run: RunConfig, shard: Shard, seed_name: str) -> tuple[np.ndarray, np.ndarray]:
    if overlap := run.spec.inputs.overlap:
        return hold_out_latest(len(shard.targets), run.holdout_fraction, overlap)
    seed = derive_seed(run.seed, "holdout", seed_name)
    return hold_out(shard.inputs, run.holdout_fraction, seed, has_target(shard.targets, run.spec.targets))


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
    some = np.full(len(inputs), True) if has_targets is None else has_targets
    check_splittable(int(some.sum()))
    ranks = input_digests(inputs, repeat(seed.to_bytes(8), len(inputs)))
    is_out = np.empty(len(inputs), bool)
    is_out[some] = is_held_out(ranks[some], fraction)
    is_out[~some] = ranks[~some] < fraction * 2.0**64
    return np.flatnonzero(~is_out), np.flatnonzero(is_out)


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


def _check_labels(name: str, labels: np.ndarray, spec: DatasetSpec) -> None:
    """Raise UsageError if one of the labels, [N, …], is none of the run's, unless it may be missing."""
    if labels.ndim > 1:
        raise UsageError(
            f"data source {name} has targets of shape {list(labels.shape[1:])}, and the run one label an"
            " example: give one, or set another task in the server's [run] table"
        )
    least = MISSING if spec.targets.missing else 0
    strangers = np.flatnonzero((labels < least) | (labels >= spec.num_classes))
    if len(strangers):
        raise UsageError(
            f"data source {name} has the label {labels[strangers[0]]}, and the run only 0 to"
            f" {spec.num_classes - 1}, first in example {strangers[0]}:"
            " set num_classes in the server's [run] table"
        )


def _own_indices(
    run: RunConfig,
    name: str,
    part: Split,
    targets: np.ndarray,
    classes: np.ndarray,
    partition: Partition | None,
) -> np.ndarray:
    if partition is None:
        return np.arange(len(targets))
    overlap = run.spec.inputs.overlap
    if overlap and part.is_series:
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
