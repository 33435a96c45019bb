"""The comparison of two models on the same examples: does the one do worse than the other, beyond chance?"""

import math
from typing import NamedTuple

import numpy as np

from ecavg.common.evaluation import Evaluation


class Comparison(NamedTuple):
    """The scores of two models on the same N examples.

    The difference of an example is its score by the model after, less its score by the one before. The mean
    of the differences tells of a change for the worse. Where an example is right or wrong the differences
    are 1, -1 and 0.
    """

    num_examples: int
    # The sum of the differences.
    total: float
    # The sum of their squares.
    squares: float

    @property
    def tolerance(self) -> float:
        """Return one standard error of the mean difference, std(ddof=1) / sqrt(N); 0 for a single example."""
        if self.num_examples < 2:
            return 0.0
        variance = (self.squares - self.total**2 / self.num_examples) / (self.num_examples - 1)
        return math.sqrt(max(0.0, variance) / self.num_examples)

    @property
    def is_worse(self) -> bool:
        """Return True if the mean difference is below -tolerance.

        Squared and multiplied out, N drops out: what is left is total² > squares. Where examples are right or
        wrong this is McNemar's statistic (lost - gained)² / (lost + gained) > 1 (Psychometrika 12, 1947), in
        whole numbers, because a single example lost is on the boundary, where rounding would decide.
        """
        if self.num_examples < 2:
            return self.total < 0
        return self.total < 0 and self.total**2 > self.squares


def compare(before: np.ndarray, after: np.ndarray) -> Comparison:
    """Return how the scores of two models differ.

    Args:
        before: float32 [N], the scores of the examples by one model.
        after: float32 [N], the same by the model that may take its place.
    """
    differences = after.astype(np.float64) - before
    return Comparison(len(before), float(differences.sum()), float((differences**2).sum()))


def objection(before: Evaluation, after: Evaluation, metric: str) -> str:
    """Return in one line why the published model should not be used; empty: it does no worse.

    Args:
        before: the evaluation of the model in use.
        after: the evaluation of the published model, on the same examples.
        metric: the name of the task's figure.
    """
    comparison = compare(before.scores.numpy(), after.scores.numpy())
    if not comparison.is_worse:
        return ""
    return (
        f"{metric} {before.score:.4f} → {after.score:.4f} on {after.num_examples} held-out examples,"
        f" worse by more than the tolerance {comparison.tolerance:.4f}"
    )
