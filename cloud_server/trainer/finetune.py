"""Fine-tuning, the training of the chosen candidate on the combined data of all agents."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig
from ecavg.common.dataset import MISSING
from ecavg.common.evaluation import predict
from ecavg.common.late_targets import KnownShard, read_known_shards
from ecavg.common.mapped import MappedRows, in_memory
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.schedule import place_of
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, gather
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

    The same examples of a shard are held out in every round, whichever other agents take part. Examples whose
    target is not known are left out.

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
        for known in known_shards(contribution, blobs_dir):
            rest, held_out = known.split(run.spec, run.fine_tune.holdout_fraction, seed)
            train_parts.append((known.shard, rest))
            held_out_parts.append((known.shard, held_out))
    examples = _mapped_examples if are_mapped and train_parts else partial(_examples, run)
    return CombinedData(examples(train_parts), examples(held_out_parts))


def read_unlabelled(run: RunConfig, contributions: Sequence[Contribution], blobs_dir: Path) -> Examples:
    """Read the examples of all shards whose target is not known, but for those that would be held out.

    Raises:
        InvalidError: a blob is neither a shard nor late targets.
        OSError: a blob cannot be read.
    """
    parts: list[tuple[Shard, np.ndarray]] = []
    for contribution in contributions:
        seed = derive_seed(run.seed, "cloud_holdout", contribution.agent_id)
        for known in known_shards(contribution, blobs_dir):
            unlabelled = known.unlabelled(run.spec, run.fine_tune.holdout_fraction, seed)
            parts.append((known.shard, unlabelled))
    return _examples(run, parts)


def pseudo_labels(model: nn.Module, inputs: Tensor, run: RunConfig, device: torch.device) -> list[int]:
    """Return for each of [N, …] the class that the model predicts, or -1 where it is not confident.

    The prediction is the label as it is, after Lee (ICML 2013 workshop), above a confidence, as in FixMatch
    (arXiv 2001.07685).
    """
    probabilities = predict(model, inputs, task=task_of(run), device=device).softmax(1)
    confidences, classes = probabilities.max(1)
    is_sure = confidences > run.fine_tune.pseudo_label_confidence
    found: list[int] = torch.where(is_sure, classes, MISSING).tolist()
    return found


def with_pseudo_labels(labelled: Examples, unlabelled: Examples, labels: Sequence[int]) -> Examples:
    """Return the examples to train on, with those that `pseudo_labels` has found a class for."""
    found = torch.tensor(labels, dtype=torch.int64)
    is_sure = found != MISSING
    return Examples(
        torch.cat([in_memory(labelled.inputs), in_memory(unlabelled.inputs)[is_sure]]),
        torch.cat([in_memory(labelled.targets), found[is_sure]]),
    )


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


def known_shards(contribution: Contribution, blobs_dir: Path) -> list[KnownShard]:
    """Return the shards of a contribution in its order, with the targets that came later.

    Raises:
        InvalidError: a blob is neither a shard nor late targets.
        OSError: a blob cannot be read.
    """
    return read_known_shards({digest: blob_path(blobs_dir, digest) for digest in contribution.shard_digests})


def _examples(run: RunConfig, parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    """Return the chosen examples of each shard, as tensors."""
    return Examples(*map(torch.from_numpy, gather(parts, run.spec)))


def _mapped_examples(parts: Sequence[tuple[Shard, np.ndarray]]) -> Examples:
    """Return the chosen examples of each shard, which stay in the files; there is at least one shard."""
    inputs = MappedRows([(shard.inputs, indices) for shard, indices in parts])
    return Examples(inputs, MappedRows([(shard.targets, indices) for shard, indices in parts]))
