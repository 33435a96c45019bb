"""Fine-tuning: the averaged model, trained on the data of all agents together.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cloud_server.contribution import Contribution
from cloud_server.state_dir import blob_path
from common.config import DatasetSpec, RunConfig
from common.shards import Shard, cloud_holdout, gather, read_shard
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


def combine(run: RunConfig, contributions: Sequence[Contribution], blobs_dir: Path) -> CombinedData:
    """Read the shards of all contributions, in the order given, and hold a part of each shard back.

    A shard's examples are held back alike in every round, whoever else takes part in it.

    Raises:
        InvalidError: a blob is no shard.
        OSError: a blob cannot be read.
    """
    train_parts: list[tuple[Shard, np.ndarray]] = []
    held_out_parts: list[tuple[Shard, np.ndarray]] = []
    for contribution in contributions:
        seed = derive_seed(run.seed, "cloud_holdout", contribution.agent_id)
        for digest in contribution.shard_digests:
            shard = read_shard(blob_path(blobs_dir, digest))
            rest, held_out = cloud_holdout(shard.labels, run.fine_tune.holdout_fraction, seed)
            train_parts.append((shard, rest))
            held_out_parts.append((shard, held_out))
    return CombinedData(_examples(run, train_parts), _examples(run, held_out_parts))


def fine_tune(
    model: nn.Module,
    examples: Examples,
    run: RunConfig,
    *,
    round_number: int,
    device: torch.device,
    precision_file: Path | None = None,
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
        precision_file=precision_file,
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


def _examples(run: RunConfig, parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    images, labels = gather(parts, run.spec.image_shape)
    return Examples(torch.from_numpy(images), torch.from_numpy(labels))
