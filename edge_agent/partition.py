"""The deal of one dataset among several agents, for simulation: every agent computes the same deal.

The deal has two random streams, both of the run's seed: one fixes which share of a class goes to which
agent, the other which examples those are. So the train and the test split of a dataset, dealt with the
same seed, give an agent the same mixture of classes.
"""

import re
from dataclasses import dataclass

import numpy as np

from ecavg.common.errors import UsageError

_SHARES_STREAM = 0
_EXAMPLES_STREAM = 1


@dataclass(frozen=True)
class Partition:
    """Part `index` (from 1 on) of a dataset that is dealt out in `count` parts."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_partition(text: str) -> Partition:
    """Return the partition that a text names: `"2/3"` is the second of three parts.

    Raises:
        UsageError: the text is not I/N with 1 <= I <= N.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise UsageError(f"partition {text!r}: write I/N, for example 1/2 for the first of two parts")
    partition = Partition(int(match[1]), int(match[2]))
    if not 1 <= partition.index <= partition.count:
        raise UsageError(f"partition {text!r}: I in I/N counts from 1 to N")
    return partition


def partition_indices(
    labels: np.ndarray, count: int, partition_by: str, seed: int, *, classes: np.ndarray | None = None
) -> list[np.ndarray]:
    """Deal the examples with these `labels` out to `count` agents.

    `partition_by` is one of
        "iid": at random, in parts whose sizes differ by one at most;
        "dirichlet:ALPHA": the share of each class that goes to each agent is drawn from a symmetric
            Dirichlet distribution (Yurochkin et al., arXiv 1905.12022): the lower ALPHA, the less alike;
        "classes:K": each agent has K classes, and shares each of them evenly with its other owners.

    Args:
        labels: int64 [N]; those below 0 are missing, and their examples are dealt out evenly.
        classes: the labels that there are, sorted, where `labels` may lack some (the test split of a
            dataset); None: those in `labels`.

    Returns:
        For each agent, int64 indices into `labels`, sorted; disjoint, and together all of them. "iid"
        leaves no part empty, the others may.

    Raises:
        UsageError: there are more agents than examples, there are not K classes, or `count` agents with
            K classes each cannot have them all.
    """
    if count > len(labels):
        raise UsageError(f"{len(labels)} examples are too few for {count} partitions: use fewer of them")
    examples = _stream(seed, _EXAMPLES_STREAM)
    scheme, _, parameter = partition_by.partition(":")
    if scheme == "iid":
        return [np.sort(part) for part in np.array_split(examples.permutation(len(labels)), count)]

    classes = np.unique(labels) if classes is None else classes
    classes = classes[classes >= 0]
    if scheme == "dirichlet":
        shares = _dirichlet_shares(len(classes), count, float(parameter), _stream(seed, _SHARES_STREAM))
    elif scheme == "classes":
        shares = _class_shares(len(classes), count, int(parameter), _stream(seed, _SHARES_STREAM))
    else:
        raise ValueError(f"unknown partition_by {partition_by!r}")
    return _deal(labels, classes, shares, examples)


def _stream(seed: int, name: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, name]))


# Shares are float64 [classes, agents]; the rows add up to 1.


def _dirichlet_shares(num_classes: int, count: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.full(count, alpha), size=num_classes)


def _class_shares(num_classes: int, count: int, per_agent: int, rng: np.random.Generator) -> np.ndarray:
    """Give each agent the classes that have the fewest owners so far, ties broken at random."""
    if per_agent > num_classes:
        raise UsageError(
            f"partition_by classes:{per_agent}: there are only {num_classes} classes; lower the number"
        )
    if count * per_agent < num_classes:
        raise UsageError(
            f"partition_by classes:{per_agent}: {count} agents with {per_agent} classes each leave some of"
            f" the {num_classes} classes to nobody; set at least classes:{-(-num_classes // count)}"
        )
    owned: np.ndarray = np.zeros((num_classes, count))
    for agent in range(count):
        fewest_owners_first = np.lexsort((rng.random(num_classes), owned.sum(axis=1)))
        owned[fewest_owners_first[:per_agent], agent] = 1
    owned /= owned.sum(axis=1, keepdims=True)
    return owned


def _deal(
    labels: np.ndarray, classes: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Shuffle each class and cut it where the agents' shares of it end; what has no class is cut evenly."""
    parts: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
    for label, share in zip(classes, shares, strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(share)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, ends), strict=True):
            part.append(piece)
    for part, piece in zip(
        parts, np.array_split(rng.permutation(np.flatnonzero(labels < 0)), len(parts)), strict=True
    ):
        part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
