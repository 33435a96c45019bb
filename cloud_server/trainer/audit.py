"""The audit, which finds agents whose labels or whose model contradict the other agents.

The audit must tell poisoned contributions from those of specialists, because agents differ in the classes
that they have and in the number of examples of each class. All comparisons are therefore made class by class.
Images of one class are much alike, whichever agent took them. An agent whose classes no other agent has is
compared with nothing, and is not flagged for that.

- labels: the share of an agent's labels with which the other agents' models agree; these models vote by the
  mean of their predictions. The expected share is the share of the others' own labels, of the same classes,
  with which the same vote agrees. It counts only examples that no agent has trained on, because the models
  may know the other examples by heart.
- model: the share of the others' held-out examples that an agent's model classifies correctly. Each class
  counts as often as it occurs in the agent's own data. The expected share is the median over the agents. An
  agent with far fewer examples than the others is not judged by its model, because a model learns little in
  few steps.

An agent is flagged if the found share is too far below the expected share. A difference is too large if it
exceeds the sum of two bounds. The first bound is a fixed part of the expected share, or three deviations of
the agents if these are larger. The second bound is three standard errors, because few examples prove little.
The audit relies on a majority of honest agents, also among the agents that have a class.

Shape suffixes: K agents, N examples of all of them, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Flag
from ecavg.cloud_server.trainer.finetune import known_shards
from ecavg.cloud_server.trainer.members import Member
from ecavg.common.batches import DeviceData
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import predict
from ecavg.common.late_targets import KnownShard
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, gather, has_target
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import load_into

# If only two agents contradict each other, nothing shows which one is right.
MIN_AGENTS = 3

# The most examples of one agent; with so many, three standard errors of a share are a tenth at most.
MAX_EXAMPLES = 200
# The most examples of all agents together, because each model is run over all of them.
MAX_EXAMPLES_IN_ALL = 4_000
# The most predicted probabilities, K·N·C, which are all in memory at once: 256 MiB.
MAX_PREDICTIONS = 1 << 26
# Fewer examples of an agent than this prove too little.
MIN_EXAMPLES = 10

# The margins are parts of the expected share. The label share varies by chance only; the model share varies
# with the length of the training, too, and so has a larger margin.
LABEL_MARGIN = 0.25
MODEL_MARGIN = 0.5
# An agent with less than this part of the median number of examples is not judged by its model.
FAR_FEWER = 0.25
NUM_DEVIATIONS = 3
# The standard deviation of a normal distribution, in median absolute deviations.
DEVIATION = 1.4826
NUM_ERRORS = 3

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Share(NamedTuple):
    """A share that was found, and the share that was expected."""

    found: float
    expected: float
    # The standard error of the difference between both.
    error: float


class Finding(NamedTuple):
    """The audit's findings about one agent; a field is None if there is nothing to compare."""

    labels: Share | None
    # The mean cross-entropy between the others' prediction and the agent's labels, in nats.
    label_loss: float | None
    model: Share | None
    flags: tuple[Flag, ...]


class _Sample(NamedTuple):
    """The examples of all agents that the audit uses."""

    # [N, …].
    inputs: Tensor
    labels_N: Integers
    # The number of the agent that has the example.
    owner_N: Integers
    # True for the examples that no agent has trained on.
    held_out_N: Booleans


def audit(
    model: nn.Module,
    members: Sequence[Member],
    blobs_dir: Path,
    *,
    run: RunConfig,
    device: torch.device,
    rest: Path | None = None,
) -> list[Finding]:
    """Return the findings about each member.

    The findings about a member without shards are empty. All findings are empty if there are too few members,
    or too many of them. Every member's model is run once over the same images.

    Args:
        model: a model of the run's structure; it is left with the weights of the last member.
        members: the members of the round, in agent-id order.
        blobs_dir: the directory of the blobs.
        run: the configuration of the run.
        device: the device on which the models are run.
        rest: the file of the cloud's values for what members do not send; None if they send whole models.

    Raises:
        RunError: the weights of a member do not fit the model.
        OSError: a file cannot be read.
    """
    nothing = [Finding(None, None, None, ()) for _ in members]
    if len(members) < MIN_AGENTS or has_too_many(len(members), run):
        return nothing
    contributions = [member.contribution for member in members]
    sample = _draw(run, contributions, blobs_dir)
    if not len(sample.labels_N):
        return nothing
    files = [[rest, member.weights_path] for member in members]
    p_KNC = _predictions(model, files, sample.inputs, run, device)
    total_NC = p_KNC.sum(0, dtype=np.float64)
    labels: list[Share | None] = []
    losses: list[float | None] = []
    models: list[Share | None] = []
    for agent, p_NC in enumerate(p_KNC):
        others_NC = (total_NC - p_NC) / (len(contributions) - 1)
        own_N, theirs_N = sample.owner_N == agent, (sample.owner_N != agent) & sample.held_out_N
        labels.append(_label_share(others_NC.argmax(1) == sample.labels_N, sample.labels_N, own_N, theirs_N))
        losses.append(_loss(others_NC[own_N], sample.labels_N[own_N]))
        models.append(_model_share(p_NC.argmax(1) == sample.labels_N, sample.labels_N, own_N, theirs_N))
    models = _expecting_the_median(models)
    few = FAR_FEWER * median(item.num_examples for item in contributions)
    judged = [
        share if item.num_examples >= few else None for share, item in zip(models, contributions, strict=True)
    ]
    bad_labels, bad_models = _fall_short(labels, LABEL_MARGIN), _fall_short(judged, MODEL_MARGIN)
    return [
        Finding(labels[agent], losses[agent], models[agent], _flags(bad_labels[agent], bad_models[agent]))
        for agent in range(len(contributions))
    ]


def has_too_many(num_agents: int, run: RunConfig) -> bool:
    """Return True if there is room for too few examples of each agent."""
    return _num_examples(num_agents, run) < MIN_EXAMPLES


def _num_examples(num_agents: int, run: RunConfig) -> int:
    """Return how many examples of one agent there is room for."""
    return min(
        MAX_EXAMPLES,
        MAX_EXAMPLES_IN_ALL // num_agents,
        MAX_PREDICTIONS // (num_agents**2 * run.spec.num_classes),
    )


def _flags(has_bad_labels: bool, has_bad_model: bool) -> tuple[Flag, ...]:
    """Return the flags of an agent."""
    found: dict[Flag, bool] = {"labels": has_bad_labels, "model": has_bad_model}
    return tuple(flag for flag, is_raised in found.items() if is_raised)


def _draw(run: RunConfig, contributions: Sequence[Contribution], blobs_dir: Path) -> _Sample:
    """Return some examples of each agent: held-out ones, and if these are too few, others as well."""
    most = _num_examples(len(contributions), run)
    parts: list[tuple[Shard, Integers]] = []
    owners, held_out = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for number, contribution in enumerate(contributions):
        agent_id = contribution.agent_id
        holdout_seed = derive_seed(run.seed, "cloud_holdout", agent_id)
        shards = [_usable(known, run, holdout_seed) for known in known_shards(contribution, blobs_dir)]
        is_chosen = _choose(
            [is_held_out for _, _, is_held_out in shards], most, derive_seed(run.seed, "audit", agent_id)
        )
        for (shard, rows, is_held_out), chosen in zip(shards, is_chosen, strict=True):
            parts.append((shard, rows[chosen]))
            held_out.append(is_held_out[chosen])
            owners.append(np.full(chosen.sum(), number))
    inputs, labels_N = gather(parts, run.spec)
    return _Sample(torch.from_numpy(inputs), labels_N, np.concatenate(owners), np.concatenate(held_out))


def _usable(known: KnownShard, run: RunConfig, seed: int) -> tuple[Shard, Integers, Booleans]:
    """Return a shard, the rows that have a target, and whether each is held out.

    No agent has trained on what is held out.
    """
    rows = np.flatnonzero(has_target(known.shard.targets, run.spec.targets))
    _, held_out = known.split(run.spec, run.fine_tune.holdout_fraction, seed)
    return known.shard, rows, np.isin(rows, held_out)


def _choose(is_held_out: Sequence[Booleans], most: int, seed: int) -> list[Booleans]:
    """Choose at most `most` examples from an agent's shards at random, the held-out ones first.

    Returns:
        For each shard, True for the examples that are chosen.
    """
    every = np.concatenate([np.zeros(0, bool), *is_held_out])
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(every))
    first = order[np.argsort(~every[order], kind="stable")]
    is_chosen = np.zeros(len(every), bool)
    is_chosen[first[:most]] = True
    ends = np.cumsum([len(each) for each in is_held_out])
    return np.split(is_chosen, ends[:-1]) if len(ends) else []


def _predictions(
    model: nn.Module,
    files: Sequence[Sequence[Path | None]],
    inputs: Tensor,
    run: RunConfig,
    device: torch.device,
) -> npt.NDArray[np.float32]:
    """Return each agent's predictions for the inputs: [K, N, C], distributions over the classes."""
    p_KNC = np.empty((len(files), len(inputs), run.spec.num_classes), np.float32)
    task = task_of(run)
    data = DeviceData(inputs, run.spec, device)
    for parts, p_NC in zip(files, p_KNC, strict=True):
        load_into(model, *parts)
        p_NC[:] = predict(model, data, task=task, device=device).softmax(1).numpy()
        # Weights that are too large to compute with give predictions that are not finite.
        p_NC[~np.isfinite(p_NC).all(1)] = 1 / run.spec.num_classes
    return p_KNC


def _label_share(agrees_N: Booleans, labels_N: Integers, own_N: Booleans, theirs_N: Booleans) -> Share | None:
    """Return the share of the agent's own labels with which the others agree; None without common classes.

    The expected share is the share of the others' own labels of the same classes with which the others agree.
    """
    own_C, own_yes_C = _counts(agrees_N, labels_N, own_N)
    theirs_C, theirs_yes_C = _counts(agrees_N, labels_N, theirs_N)
    weight_C = _weights(own_C, theirs_C)
    if weight_C is None:
        return None
    error_C = _variance(own_yes_C, own_C) + _variance(theirs_yes_C, theirs_C)
    return Share(
        found=float(weight_C @ _ratio(own_yes_C, own_C)),
        expected=float(weight_C @ _ratio(theirs_yes_C, theirs_C)),
        error=float(np.sqrt(weight_C**2 @ error_C)),
    )


def _model_share(right_N: Booleans, labels_N: Integers, own_N: Booleans, theirs_N: Booleans) -> Share | None:
    """Return the share of the others' examples that the agent's model classifies correctly.

    The share is None if no other agent has held-out examples of the agent's classes. The expected share is
    left at 0; `_expecting_the_median` sets it.
    """
    own_C, _ = _counts(right_N, labels_N, own_N)
    theirs_C, right_C = _counts(right_N, labels_N, theirs_N)
    weight_C = _weights(own_C, theirs_C)
    if weight_C is None:
        return None
    error = np.sqrt(weight_C**2 @ _variance(right_C, theirs_C))
    return Share(float(weight_C @ _ratio(right_C, theirs_C)), 0.0, float(error))


def _expecting_the_median(shares: Sequence[Share | None]) -> list[Share | None]:
    """Return the shares with the median of all found shares as the expected share of each."""
    known = [share.found for share in shares if share]
    return [share and share._replace(expected=median(known)) for share in shares]


def _fall_short(shares: Sequence[Share | None], margin: float) -> list[bool]:
    """Return, for each agent, True if its share is further below the expected share than chance explains."""
    known = [share.expected - share.found for share in shares if share]
    if not known:
        return [False for _ in shares]
    # If most agents fall short by the same amount, then this amount is not held against anyone. If most
    # agents do better than expected, then the others need not do so, too.
    usual = max(0.0, median(known))
    spread = NUM_DEVIATIONS * DEVIATION * median(abs(each - median(known)) for each in known)
    return [
        share is not None
        and share.expected - share.found - usual
        > max(margin * share.expected, spread) + NUM_ERRORS * share.error
        for share in shares
    ]


def _loss(p_NC: Floats, labels_N: Integers) -> float | None:
    """Return the mean cross-entropy between predictions and labels, in nats; None if there are no labels."""
    if not len(labels_N):
        return None
    p_N = p_NC[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(p_N, np.finfo(np.float32).tiny)).mean())


def _counts(is_yes_N: Booleans, labels_N: Integers, chosen_N: Booleans) -> tuple[Floats, Floats]:
    """Return, for each class, the number of chosen examples, and of those for which `is_yes_N` is true."""
    num_classes = int(labels_N.max()) + 1
    count_C = np.bincount(labels_N[chosen_N], minlength=num_classes)
    yes_C = np.bincount(labels_N[chosen_N & is_yes_N], minlength=num_classes)
    return count_C.astype(float), yes_C.astype(float)


def _weights(own_C: Floats, theirs_C: Floats) -> Floats | None:
    """Return the frequency of each class in the agent's examples, among the classes that others have, too.

    The result is None if there are no such classes.
    """
    weight_C = np.where(theirs_C > 0, own_C, 0)
    return weight_C / weight_C.sum() if weight_C.any() else None


def _ratio(part_C: Floats, whole_C: Floats) -> Floats:
    """Return the quotient for each class; the quotient of an empty class is 0."""
    return np.asarray(part_C / np.maximum(whole_C, 1))


def _variance(yes_C: Floats, count_C: Floats) -> Floats:
    """Return the variance of each class's share of yes.

    The share is estimated by Laplace's rule, so that one yes out of one example is not taken as certain.
    """
    p_C = (yes_C + 1) / (count_C + 2)
    return np.asarray(p_C * (1 - p_C) / np.maximum(count_C, 1))
