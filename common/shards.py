"""Shards: one agent's images and labels as a safetensors file, and the splits that hold some back.

Shape suffixes: N images, C channels, H height, W width.
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
    """Images and what they show."""

    images: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray  # int64 [N]


def write_shard(path: Path, shard: Shard) -> None:
    """Write the shard; the same shard gives the same bytes. A reader never sees half of it.

    Raises:
        ValueError: the arrays are not a shard.
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
    """Map the shard at `path`: the arrays are read-only views of the file, no copies.

    Raises:
        InvalidError: INVALID_FILE.
        KeyError: a safetensors file that `schema.check_shard` would refuse.
        OSError: the file cannot be read.
    """
    header = read_header(path)
    data = np.memmap(path, np.uint8, mode="r", offset=header.data_start)
    images, labels = _view(data, header, "images"), _view(data, header, "labels")
    return Shard(images, np.require(labels, requirements="A"))  # another's file may not align them


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back `fraction` of the examples, as near as counts allow also of each class.

    Args:
        labels: int64 [N], N of at least 2.
        fraction: of the examples to hold back, above 0 and below 1.
        seed: the same seed and labels give the same split.

    Returns:
        Sorted int64 indices of the rest and of the held-out part: disjoint, complete, neither empty.

    Raises:
        UsageError: fewer than two examples.
    """
    check_splittable(len(labels))
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    num_held_out = min(max(1, round(fraction * len(labels))), len(labels) - 1)
    # Equal steps along the examples in class order take from each class its share, rounded up or down.
    start = generator.integers(len(labels))
    steps = (np.arange(num_held_out) * len(labels) + start) // num_held_out
    is_held_out = np.zeros(len(labels), bool)
    is_held_out[by_class[steps]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def check_splittable(num_examples: int) -> None:
    """Raises UsageError: they are too few to hold some back and to have some left."""
    if num_examples < 2:
        raise UsageError(f"{num_examples} examples cannot be split: at least 2 are needed to hold some back")


def cloud_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What the cloud holds back of one shard to choose and to evaluate models on.

    The agent computes the same and does not pre-train on it: a model that had seen these examples would
    look better to the cloud than it is. Each shard is split by itself, so that no other shard that its
    agent comes to have makes a difference.

    Args:
        labels: int64 [N], of the whole shard.
        fraction: `run.fine_tune.holdout_fraction`.
        seed: of the run's stream "cloud_holdout" for the agent's id.

    Returns:
        Indices like those of `split`; with fewer than two examples nothing is held back.
    """
    if len(labels) < 2:
        return np.arange(len(labels)), np.arange(0)
    return split(labels, fraction, seed)


def gather(parts: Sequence[tuple[Shard, np.ndarray]], image_shape: tuple[int, int, int]) -> Shard:
    """The chosen examples of all shards, each copied once, from the mapped file to where it stays.

    Args:
        parts: shards of images of `image_shape`, each with int64 indices into it.
    """
    num_examples = sum(len(indices) for _, indices in parts)
    images = np.empty((num_examples, *image_shape), np.uint8)
    labels = np.empty(num_examples, np.int64)
    begin = 0
    for shard, indices in parts:
        chosen = slice(begin, begin + len(indices))
        # The default mode would go through a buffer, to leave `out` alone when an index is wrong.
        np.take(shard.images, indices, axis=0, out=images[chosen], mode="clip")
        labels[chosen] = shard.labels[indices]
        begin = chosen.stop
    return Shard(images, labels)


def _view(data: np.ndarray, header: Header, name: str) -> np.ndarray:
    begin, end = header.offsets[name]
    dtype, shape = header.schema[name]
    return data[begin:end].view(_NUMPY_DTYPES[dtype]).reshape(shape)
