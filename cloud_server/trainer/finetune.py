"""Fine-tuning, the training of the chosen candidate on the combined data of all agents."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig
from ecavg.common.mapped import MappedRows
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.schedule import place_of
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, cloud_holdout, gather, read_shard
from ecavg.common.tasks.task import task_of
from ecavg.common.training import AfterStep, Examples, OnStep, Recipe, choose_precision, train


class CombinedData(NamedTuple):
    """The examples that all agents have uploaded; either part may be empty."""

    train: Examples
    held_out: Examples


def combine(
    run: RunConfig, contributions: Sequence[Contribution], blobs_dir: Path, *, are_mapped: bool = False
) -> CombinedData:
    """Read the shards of all contributions, in the order given, and hold out a part of each shard.

    The same examples of a shard are held out in every round, whichever other agents take part.

    Args:
        run: the configuration of the run.
        contributions: the contributions, in agent-id order.
        blobs_dir: the directory of the blobs.
        are_mapped: whether the examples stay in the files until they are asked for, as for a rank that
            needs only a part of them at a time.

    Raises:
        InvalidError: a blob is not a shard.
        OSError: a blob cannot be read.
    """
    train_parts: list[tuple[Shard, np.ndarray]] = []
    held_out_parts: list[tuple[Shard, np.ndarray]] = []
    for contribution in contributions:
        seed = derive_seed(run.seed, "cloud_holdout", contribution.agent_id)
        for digest in contribution.shard_digests:
            shard = read_shard(blob_path(blobs_dir, digest))
            rest, held_out = cloud_holdout(
                shard.targets, run.fine_tune.holdout_fraction, seed, run.spec.inputs.overlap
            )
            train_parts.append((shard, rest))
            held_out_parts.append((shard, held_out))
    examples = _mapped_examples if are_mapped and train_parts else partial(_examples, run)
    return CombinedData(examples(train_parts), examples(held_out_parts))


def fine_tune(
    model: nn.Module,
    examples: Examples,
    run: RunConfig,
    *,
    round_number: int,
    planned_rounds: int = 1,
    has_full_curve: bool = False,
    device: torch.device,
    precision_path: Path | None = None,
    on_step: OnStep | None = None,
    after_step: AfterStep = lambda: None,
    ranks: Ranks = ALONE,
    checkpoint: CheckpointFile | None = None,
) -> None:
    """Train the model in place on the examples; `train` in common/training.py has arguments and exceptions.

    Args:
        model: the model, with the weights from which the fine-tune starts.
        examples: the training part of the combined data.
        run: the configuration of the run.
        round_number: the number of the round, from which the seed and the place in the schedule follow; 0 for
            the warm-up.
        planned_rounds: how many rounds the learning-rate schedule is for.
        has_full_curve: whether the learning rate takes a full curve in this round after the plan.
        device: the device to train on.
        precision_path: the file that keeps the choice of the precision; None keeps it nowhere.
        on_step: a callback for reports on the training.
        after_step: a callback for every step of the training.
        ranks: this process's place among the ranks.
        checkpoint: keeps the last finished epoch, from which the same fine-tune goes on.
    """
    config = run.fine_tune_of(round_number)
    kept_at = precision_path if ranks == ALONE else None
    task = task_of(run)
    precision = choose_precision(model, examples, config, task=task, device=device, kept_at=kept_at)
    seed = derive_seed(run.seed, round_number, "fine_tune")
    place = place_of(run, "fine_tune", round_number, planned_rounds, has_full_curve=has_full_curve)
    recipe = Recipe(config, task, seed, precision, config.class_balanced, place)
    train(
        model,
        examples,
        recipe,
        device=device,
        on_step=on_step,
        after_step=after_step,
        ranks=ranks,
        checkpoint=checkpoint,
    )


def _examples(run: RunConfig, parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    """Return the chosen examples of each shard, as tensors."""
    return Examples(*map(torch.from_numpy, gather(parts, run.spec)))


def _mapped_examples(parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    """Return the chosen examples of each shard, which stay in the files; there is at least one shard."""
    inputs = MappedRows([(shard.inputs, indices) for shard, indices in parts])
    return Examples(inputs, MappedRows([(shard.targets, indices) for shard, indices in parts]))
