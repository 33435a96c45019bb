"""Fine-tuning: the averaged model, trained on the data of all agents together.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cloud_server.jobs import JobContribution, blob_path
from common.config import DatasetSpec, RunConfig
from common.shards import Shard, cloud_holdout, read_shard
from common.training import OnStep, derive_seed, predict, train
from common.weights import load_into


class Examples(NamedTuple):
    """Images and what they show."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]


class CombinedData(NamedTuple):
    """What all agents uploaded; either part may be empty."""

    train: Examples
    held_out: Examples


def combine(run: RunConfig, contributions: Sequence[JobContribution], blobs_dir: Path) -> CombinedData:
    """Read the shards of all contributions, in the order given, and hold some of each contribution back.

    An agent's examples are held back alike in every round, whoever else takes part in it.

    Raises:
        InvalidError: a blob is no shard.
        OSError: a blob cannot be read.
    """
    train_parts: list[tuple[Shard, np.ndarray]] = []
    held_out_parts: list[tuple[Shard, np.ndarray]] = []
    for contribution in contributions:
        shards = [read_shard(blob_path(blobs_dir, digest)) for digest in contribution.shards]
        rest, held_out = _split(shards, run, contribution.agent_id)
        train_parts += _by_shard(shards, rest)
        held_out_parts += _by_shard(shards, held_out)
    image_shape = run.spec.image_shape
    return CombinedData(_gather(train_parts, image_shape), _gather(held_out_parts, image_shape))


def fine_tune(
    model: nn.Module,
    examples: Examples,
    run: RunConfig,
    *,
    round_number: int,
    device: torch.device,
    soft_labels: Tensor | None = None,
    on_step: OnStep | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Train the model in place; the arguments and what is raised are those of common.training.train."""
    train(
        model,
        *examples,
        run.fine_tune,
        spec=run.spec,
        device=device,
        seed=derive_seed(run.seed, round_number, "fine_tune"),
        on_step=on_step,
        rank=rank,
        world_size=world_size,
        soft_labels=soft_labels,
        distill=run.fine_tune.distill,
        class_balanced=run.fine_tune.class_balanced,
    )


def soft_labels(
    model: nn.Module,
    weights: Sequence[Path],
    coefficients: Sequence[float],
    images: Tensor,
    *,
    spec: DatasetSpec,
    device: torch.device,
) -> Tensor:
    """What the ensemble of the agents' models says of the images: the softmax of their mean logits.

    (FedDF, Lin et al., arXiv 2006.07242, section 3.)

    Args:
        model: left with the weights of the last agent.
        coefficients: what each agent's logits count; only their ratios matter.
        images: uint8 [N, C, H, W].

    Returns:
        float32 [N, K], each row a distribution over the K classes.
    """
    total = torch.zeros(len(images), spec.num_classes)
    for path, coefficient in zip(weights, coefficients, strict=True):
        load_into(model, path)
        total.add_(predict(model, images, spec=spec, device=device), alpha=coefficient / sum(coefficients))
    return total.softmax(1)


def _split(shards: Sequence[Shard], run: RunConfig, agent_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices into one agent's examples: those to train on, those to hold back."""
    labels = np.concatenate([np.empty(0, np.int64), *(shard.labels for shard in shards)])
    seed = derive_seed(run.seed, "cloud_holdout", agent_id)
    return cloud_holdout(labels, run.fine_tune.holdout_fraction, seed)


def _by_shard(shards: Iterable[Shard], indices: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
    """Indices into the shards one after the other → indices into each of them."""
    begin = 0
    for shard in shards:
        end = begin + len(shard.labels)
        yield shard, indices[(begin <= indices) & (indices < end)] - begin
        begin = end


def _gather(parts: Sequence[tuple[Shard, np.ndarray]], image_shape: tuple[int, int, int]) -> Examples:
    """The chosen examples of all shards, each copied once, from the mapped file to where it stays."""
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
    return Examples(torch.from_numpy(images), torch.from_numpy(labels))
