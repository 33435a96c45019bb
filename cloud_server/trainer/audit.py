"""The audit: whose labels the others' models contradict, and whose model fails on the others' images.

It has to tell poison from specialists. Agents differ in which classes they have, and how many of each. So
everything is compared class by class: images of one class are much alike, whoever took them, and an agent
whose classes nobody else knows is compared with nothing, and not held guilty of that.

- labels: the share of an agent's labels that the others agree with, as the mean of what their models
  predict. To be expected is the share of the others' own labels of the same classes that this very
  ensemble agrees with; only of examples that nobody has trained on, which it cannot know by heart.
- model: the share of the others' held-out examples that an agent's model is right about, each class taken
  as often as the agent has it itself. To be expected is the median over the agents. One that has far fewer
  examples than the others is not judged by this: in a few steps, nobody learns much.

An agent is flagged if what was found falls short of what was to be expected by more than a part of that
(more than three deviations of the agents, where these vary so much) and by three standard errors besides:
few examples prove nothing. All of this holds for honest agents in the majority, also within a class.

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

from cloud_server.contribution import Contribution
from cloud_server.jobs import Flag
from cloud_server.state_dir import blob_path
from cloud_server.trainer.members import Member
from common.config import RunConfig
from common.shards import Shard, cloud_holdout, gather, read_shard
from common.training import derive_seed, predict
from common.weights import load_into

MIN_AGENTS = 3  # of two that contradict each other, nobody knows which one is right

MAX_EXAMPLES = 200  # of one agent: three standard errors of a share are then a tenth at most
MAX_EXAMPLES_IN_ALL = 4_000  # each model sees all of them: with many agents, fewer of each
MAX_PREDICTIONS = 1 << 24  # K·N·C, all held at once: 64 MiB

# Parts of what was to be expected. Labels vary by chance alone; models also by how long they were trained.
LABEL_MARGIN = 0.25
MODEL_MARGIN = 0.5
FAR_FEWER = 0.25  # of the median number of examples
NUM_DEVIATIONS = 3
DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
NUM_ERRORS = 3

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Share(NamedTuple):
    """A share that was counted, and the one that was to be expected."""

    found: float
    expected: float
    error: float  # standard error of their difference


class Finding(NamedTuple):
    """What the audit says of one agent; None: there is nothing to compare."""

    labels: Share | None
    label_loss: float | None  # mean cross-entropy of the others' prediction to the agent's labels, nats
    model: Share | None
    flags: tuple[Flag, ...]


class _Sample(NamedTuple):
    """Examples of all agents."""

    images: Tensor  # uint8 [N, channels, height, width]
    labels_N: Integers
    owner_N: Integers  # number of the agent
    held_out_N: Booleans  # nobody has trained on it


def audit(
    model: nn.Module,
    members: Sequence[Member],
    blobs_dir: Path,
    *,
    run: RunConfig,
    device: torch.device,
) -> list[Finding]:
    """Return what is to be said of each member: nothing of one without shards, or among too few.

    Every member's model is run over the same images, once.

    Args:
        model: a model of the run's structure; it is left with the weights of the last member.

    Raises:
        RunError: weights are not the model's.
        OSError: a file cannot be read.
    """
    nothing = [Finding(None, None, None, ()) for _ in members]
    if len(members) < MIN_AGENTS:
        return nothing
    contributions = [member.contribution for member in members]
    sample = _draw(run, contributions, blobs_dir)
    if not len(sample.labels_N):
        return nothing
    p_KNC = _predictions(model, [member.weights_path for member in members], sample.images, run, device)
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


def _flags(has_bad_labels: bool, has_bad_model: bool) -> tuple[Flag, ...]:
    found: dict[Flag, bool] = {"labels": has_bad_labels, "model": has_bad_model}
    return tuple(flag for flag, is_raised in found.items() if is_raised)


def _draw(run: RunConfig, contributions: Sequence[Contribution], blobs_dir: Path) -> _Sample:
    """Some examples of each agent: held-out ones, and where these are too few, others as well."""
    num_agents = len(contributions)
    most = min(
        MAX_EXAMPLES,
        MAX_EXAMPLES_IN_ALL // num_agents,
        MAX_PREDICTIONS // (num_agents**2 * run.spec.num_classes),
    )
    parts: list[tuple[Shard, Integers]] = []
    owners, held_out = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for number, contribution in enumerate(contributions):
        agent_id = contribution.agent_id
        shards = [read_shard(blob_path(blobs_dir, digest)) for digest in contribution.shard_digests]
        is_held_out = [
            _is_held_out(
                shard, run.fine_tune.holdout_fraction, derive_seed(run.seed, "cloud_holdout", agent_id)
            )
            for shard in shards
        ]
        is_chosen = _choose(is_held_out, most, derive_seed(run.seed, "audit", agent_id))
        for shard, chosen, known in zip(shards, is_chosen, is_held_out, strict=True):
            parts.append((shard, np.flatnonzero(chosen)))
            held_out.append(known[chosen])
            owners.append(np.full(chosen.sum(), number))
    images, labels_N = gather(parts, run.spec.image_shape)
    return _Sample(torch.from_numpy(images), labels_N, np.concatenate(owners), np.concatenate(held_out))


def _is_held_out(shard: Shard, fraction: float, seed: int) -> Booleans:
    """Of each example, whether nobody has trained on it."""
    _, held_out = cloud_holdout(shard.labels, fraction, seed)
    return np.isin(np.arange(len(shard.labels)), held_out)


def _choose(is_held_out: Sequence[Booleans], most: int, seed: int) -> list[Booleans]:
    """So many examples of an agent's shards at most, the held-out ones first, else at random."""
    every = np.concatenate([np.zeros(0, bool), *is_held_out])
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(every))
    first = order[np.argsort(~every[order], kind="stable")]
    is_chosen = np.zeros(len(every), bool)
    is_chosen[first[:most]] = True
    ends = np.cumsum([len(each) for each in is_held_out])
    return np.split(is_chosen, ends[:-1]) if len(ends) else []


def _predictions(
    model: nn.Module, weights_paths: Sequence[Path], images: Tensor, run: RunConfig, device: torch.device
) -> npt.NDArray[np.float32]:
    """What each agent's model makes of the images: [K, N, C], distributions over the classes."""
    p_KNC = np.empty((len(weights_paths), len(images), run.spec.num_classes), np.float32)
    for path, p_NC in zip(weights_paths, p_KNC, strict=True):
        load_into(model, path)
        p_NC[:] = predict(model, images, spec=run.spec, device=device).softmax(1).numpy()
        p_NC[~np.isfinite(p_NC).all(1)] = 1 / run.spec.num_classes  # of weights too large to compute with
    return p_KNC


def _label_share(agrees_N: Booleans, labels_N: Integers, own_N: Booleans, theirs_N: Booleans) -> Share | None:
    """Of the agent's own labels, those that the others agree with; expected by what they say of theirs."""
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
    """Of the others' examples, those that the agent's model is right about; nothing is expected yet."""
    own_C, _ = _counts(right_N, labels_N, own_N)
    theirs_C, right_C = _counts(right_N, labels_N, theirs_N)
    weight_C = _weights(own_C, theirs_C)
    if weight_C is None:
        return None
    error = np.sqrt(weight_C**2 @ _variance(right_C, theirs_C))
    return Share(float(weight_C @ _ratio(right_C, theirs_C)), 0.0, float(error))


def _expecting_the_median(shares: Sequence[Share | None]) -> list[Share | None]:
    known = [share.found for share in shares if share]
    return [share and share._replace(expected=median(known)) for share in shares]


def _fall_short(shares: Sequence[Share | None], margin: float) -> list[bool]:
    """Of each agent, whether it falls short of what was to be expected by more than can be chance."""
    known = [share.expected - share.found for share in shares if share]
    if not known:
        return [False for _ in shares]
    # Of agents that all fall short alike, none is strange; but nobody has to do better than expected.
    usual = max(0.0, median(known))
    spread = NUM_DEVIATIONS * DEVIATION * median(abs(each - median(known)) for each in known)
    return [
        share is not None
        and share.expected - share.found - usual
        > max(margin * share.expected, spread) + NUM_ERRORS * share.error
        for share in shares
    ]


def _loss(p_NC: Floats, labels_N: Integers) -> float | None:
    """Mean cross-entropy, nats."""
    if not len(labels_N):
        return None
    p_N = p_NC[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(p_N, np.finfo(np.float32).tiny)).mean())


def _counts(is_yes_N: Booleans, labels_N: Integers, chosen_N: Booleans) -> tuple[Floats, Floats]:
    """Of each class, how many of the chosen examples have it, and of how many of these it is so."""
    num_classes = int(labels_N.max()) + 1
    count_C = np.bincount(labels_N[chosen_N], minlength=num_classes)
    yes_C = np.bincount(labels_N[chosen_N & is_yes_N], minlength=num_classes)
    return count_C.astype(float), yes_C.astype(float)


def _weights(own_C: Floats, theirs_C: Floats) -> Floats | None:
    """How often the agent has each class, of those that others have as well; None: there is none."""
    weight_C = np.where(theirs_C > 0, own_C, 0)
    return weight_C / weight_C.sum() if weight_C.any() else None


def _ratio(part_C: Floats, whole_C: Floats) -> Floats:
    return np.asarray(part_C / np.maximum(whole_C, 1))


def _variance(yes_C: Floats, count_C: Floats) -> Floats:
    """Of each share that was counted; by Laplace's rule, so that one of one is not certain."""
    p_C = (yes_C + 1) / (count_C + 2)
    return np.asarray(p_C * (1 - p_C) / np.maximum(count_C, 1))
