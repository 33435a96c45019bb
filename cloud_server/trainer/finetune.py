"""Fine-tuning: the averaged model, trained on the data of all agents together.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cloud_server.contribution import Contribution
from cloud_server.state_dir import blob_path
from common.config import RunConfig
from common.shards import Shard, cloud_holdout, gather, read_shard
from common.training import (
    ALONE,
    Examples,
    OnStep,
    Ranks,
    Recipe,
    choose_precision,
    derive_seed,
    train,
)


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
    precision_path: Path | None = None,
    on_step: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train the model in place; the arguments and what is raised are those of common.training.

    Args:
        precision_path: the file that keeps the choice of the precision.
    """
    config = run.fine_tune
    kept_at = precision_path if ranks == ALONE else None
    precision = choose_precision(model, examples, config, spec=run.spec, device=device, kept_at=kept_at)
    seed = derive_seed(run.seed, round_number, "fine_tune")
    recipe = Recipe(config, run.spec, seed, precision, config.class_balanced)
    train(model, examples, recipe, device=device, on_step=on_step, ranks=ranks)


def _examples(run: RunConfig, parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    images, labels = gather(parts, run.spec.image_shape)
    return Examples(torch.from_numpy(images), torch.from_numpy(labels))
