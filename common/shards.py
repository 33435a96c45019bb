"""Shards, each the images and labels of one agent in a safetensors file, and the splits of a shard.

Shape letters: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common.errors import UsageError
from common.files import replacing
from common.schema import Header, read_header

_NUMPY_DTYPES = {"U8": "u1", "I64": "<i8"}


class Shard(NamedTuple):
    """The images and labels of one agent."""

    images: np.ndarray
    """uint8 [N, C, H, W]"""
    labels: np.ndarray
    """int64 [N]"""


def write_shard(path: Path, shard: Shard) -> None:
    """Write the shard to the file at `path`.

    The same shard always gives the same bytes. The complete file appears at once, by a rename.

    Raises:
        ValueError: the dtypes or shapes of the arrays are not those of a shard.
        OSError: the file cannot be written.
    """
    images, labels = (np.ascontiguousarray(array) for array in shard)
    if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64:
        raise ValueError(f"{images.dtype} {images.shape} images and {labels.dtype} labels are no shard")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images have labels of shape {labels.shape}")
    with replacing(path) as partial:
        try:
            save_file({"images": images, "labels": labels}, partial)
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
    data = np.memmap(path, np.uint8, mode="r", offset=header.data_start)
    images, labels = _view(data, header, "images"), _view(data, header, "labels")
    # Another program may have written the file with labels that are not aligned in memory.
    return Shard(images, np.require(labels, requirements="A"))


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


def cloud_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off the part of one shard on which the cloud selects and evaluates models.

    The agent computes the same split and does not pre-train on the held-out part, because the cloud would
    overrate a model that has seen the held-out examples. Each shard is split by itself, so the split of a
    shard does not depend on the other shards of the agent.

    Args:
        labels: int64 [N], the labels of the whole shard.
        fraction: the value of `run.fine_tune.holdout_fraction`.
        seed: the seed of the run's stream "cloud_holdout" for the agent's id.

    Returns:
        Indices like those of `split`. With fewer than two examples, the held-out part is empty.
    """
    if len(labels) < 2:
        return np.arange(len(labels)), np.arange(0)
    return split(labels, fraction, seed)


def gather(parts: Sequence[tuple[Shard, np.ndarray]], image_shape: tuple[int, int, int]) -> Shard:
    """Copy the chosen examples of all shards into one new shard.

    Each example is copied once, from the mapped file into the result.

    Args:
        parts: the shards, each with the int64 indices of its chosen examples.
        image_shape: the shape (C, H, W) of the images in all shards.
    """
    num_examples = sum(len(indices) for _, indices in parts)
    images = np.empty((num_examples, *image_shape), np.uint8)
    labels = np.empty(num_examples, np.int64)
    begin = 0
    for shard, indices in parts:
        chosen = slice(begin, begin + len(indices))
        # The default mode copies through a buffer, in order to keep `out` unchanged if an index is wrong.
        np.take(shard.images, indices, axis=0, out=images[chosen], mode="clip")
        labels[chosen] = shard.labels[indices]
        begin = chosen.stop
    return Shard(images, labels)


def _view(data: np.ndarray, header: Header, name: str) -> np.ndarray:
    """Return the tensor `name` as a view of `data`, the bytes of a file after its header."""
    begin, end = header.offsets[name]
    dtype, shape = header.schema[name]
    return data[begin:end].view(_NUMPY_DTYPES[dtype]).reshape(shape)
