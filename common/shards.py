"""Shards, each the inputs and targets of one agent in a safetensors file, and the splits of a shard.

Shape letters: N examples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ecavg.common.dataset import DatasetSpec, InputDtype, Inputs, TargetDtype, Targets
from ecavg.common.errors import UsageError
from ecavg.common.files import replacing
from ecavg.common.schema import Header, are_missing, read_header

_NUMPY_DTYPES = {"U8": "u1", "I64": "<i8", "F32": "<f4"}
_NAMES = (("images", "labels"), ("inputs", "targets"))


class Shard(NamedTuple):
    """The inputs and targets of one agent."""

    inputs: np.ndarray
    """uint8, float32 or int64 [N, …]"""
    targets: np.ndarray
    """int64 or float32 [N, …]"""


def write_shard(path: Path, shard: Shard) -> None:
    """Write the shard to the file at `path`.

    The same shard always gives the same bytes. The complete file appears at once, by a rename.

    Raises:
        ValueError: the dtypes or shapes of the arrays are not those of a shard.
        OSError: the file cannot be written.
    """
    inputs, targets = (np.ascontiguousarray(array) for array in shard)
    if inputs.dtype.name not in get_args(InputDtype) or targets.dtype.name not in get_args(TargetDtype):
        raise ValueError(f"{inputs.dtype} {inputs.shape} inputs and {targets.dtype} targets are no shard")
    if targets.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"{len(inputs)} inputs have targets of shape {targets.shape}")
    described = Inputs(cast(InputDtype, inputs.dtype.name), inputs.shape[1:])
    names = DatasetSpec(
        described, Targets(cast(TargetDtype, targets.dtype.name), targets.shape[1:])
    ).tensor_names
    with replacing(path) as partial:
        try:
            save_file(dict(zip(names, (inputs, targets), strict=True)), partial)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read_shard(path: Path) -> Shard:
    """Map the shard at `path` into memory, and return arrays that are read-only views of the file.

    Raises:
        InvalidError: INVALID_FILE, the file is not a safetensors file.
        KeyError: the file is not a shard; `schema.check_shard` would refuse it.
        OSError: the file cannot be read.
    """
    header = read_header(path)
    return Shard(*read_tensors(path, header, _NAMES[0] if _NAMES[0][0] in header.schema else _NAMES[1]))


def read_tensors(path: Path, header: Header, names: Sequence[str]) -> list[np.ndarray]:
    """Map a file into memory, and return these tensors, of the dtypes of examples, as read-only views.

    Raises:
        KeyError: the file has no such tensor.
        OSError: the file cannot be read.
    """
    data = np.memmap(path, np.uint8, mode="r", offset=header.data_start)
    # Another program may have written the file with values that are not aligned in memory.
    return [np.require(_view(data, header, name), requirements="A") for name in names]


def has_target(targets: np.ndarray, described: Targets) -> np.ndarray:
    """Return for each of [N, …] whether it is a target: bool [N]; all are, unless some may be missing."""
    if not described.missing:
        return np.ones(len(targets), bool)
    return np.asarray(~are_missing(targets).any(tuple(range(1, targets.ndim))))


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the examples into a rest and a held-out part, with about the same fraction of each class.

    Args:
        labels: int64 [N], with N of at least 2.
        fraction: the fraction of the examples to hold out, above 0 and below 1.
        seed: the seed of the split; the same seed and labels give the same split.

    Returns:
        Sorted int64 indices of the rest, and of the held-out part. Each example is in exactly one of the
        two parts, and neither part is empty.

    Raises:
        UsageError: there are fewer than two examples.
    """
    check_splittable(len(labels))
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    num_held_out = min(max(1, round(fraction * len(labels))), len(labels) - 1)
    # Equal steps along the examples in class order take the fraction of each class, rounded up or down.
    start = generator.integers(len(labels))
    steps = (np.arange(num_held_out) * len(labels) + start) // num_held_out
    is_held_out = np.zeros(len(labels), bool)
    is_held_out[by_class[steps]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def check_splittable(num_examples: int) -> None:
    """Raise UsageError if there are fewer than two examples, which `split` cannot split."""
    if num_examples < 2:
        raise UsageError(f"{num_examples} examples cannot be split: at least 2 are needed to hold some back")


def cloud_holdout(
    targets: np.ndarray, fraction: float, seed: int, overlap: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split off the part of one shard on which the cloud selects and evaluates models.

    The agent computes the same split and does not pre-train on the held-out part, because the cloud would
    overrate a model that has seen the held-out examples. Each shard is split by itself, so the split of a
    shard does not depend on the other shards of the agent.

    Args:
        targets: [N, …], the targets of the whole shard. About the same fraction of each class is held out
            where they are labels, int64 [N]; others are split whatever they are.
        fraction: the value of `run.fine_tune.holdout_fraction`.
        seed: the seed of the run's stream "cloud_holdout" for the agent's id.
        overlap: how many of the next examples share values with an example. If there are any, the split is
            that of `_middle_block`.

    Returns:
        Indices like those of `split`. With fewer than two examples, the held-out part is empty.
    """
    if overlap:
        return _middle_block(len(targets), fraction, overlap)
    if len(targets) < 2:
        return np.arange(len(targets)), np.arange(0)
    are_labels = targets.dtype == np.int64 and targets.ndim == 1
    return split(targets if are_labels else np.zeros(len(targets), np.int64), fraction, seed)


def _middle_block(num_examples: int, fraction: float, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a block in the middle, and leave out `overlap` examples on either side of it.

    The block is so far from both ends that it shares nothing with the shards before and after, either.

    Returns:
        Sorted int64 indices of the rest and of the block. With too few examples, the block is empty.
    """
    num_held_out = max(1, round(fraction * num_examples))
    begin = (num_examples - num_held_out) // 2
    end = begin + num_held_out
    if begin <= overlap:
        return np.arange(num_examples), np.arange(0)
    rest = np.arange(begin - overlap), np.arange(end + overlap, num_examples)
    return np.concatenate(rest), np.arange(begin, end)


def gather(parts: Sequence[tuple[Shard, np.ndarray]], spec: DatasetSpec) -> Shard:
    """Copy the chosen examples of all shards into one new shard.

    Each example is copied once, from the mapped file into the result.

    Args:
        parts: the shards, each with the int64 indices of its chosen examples.
        spec: the inputs and targets in all shards.
    """
    num_examples = sum(len(indices) for _, indices in parts)
    inputs = np.empty((num_examples, *spec.inputs.shape), spec.inputs.dtype)
    targets = np.empty((num_examples, *spec.targets.shape), spec.targets.dtype)
    begin = 0
    for shard, indices in parts:
        chosen = slice(begin, begin + len(indices))
        # The default mode copies through a buffer, in order to keep `out` unchanged if an index is wrong.
        np.take(shard.inputs, indices, axis=0, out=inputs[chosen], mode="clip")
        targets[chosen] = shard.targets[indices]
        begin = chosen.stop
    return Shard(inputs, targets)


def _view(data: np.ndarray, header: Header, name: str) -> np.ndarray:
    """Return the tensor `name` as a view of `data`, the bytes of a file after its header."""
    begin, end = header.offsets[name]
    dtype, shape = header.schema[name]
    return data[begin:end].view(_NUMPY_DTYPES[dtype]).reshape(shape)
