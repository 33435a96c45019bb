"""The comparison of a published model with the one in use: does it do worse on this device?"""

import math
from typing import NamedTuple

import numpy as np


class Comparison(NamedTuple):
    """The predictions of two models on the same N examples.

    The difference of an example is 1 where only the model after is right, -1 where only the one before is,
    else 0. The mean of the differences tells of a change for the worse.
    """

    num_examples: int
    # The number of examples whose difference is 1.
    num_gained: int
    # The number of examples whose difference is -1.
    num_lost: int

    @property
    def tolerance(self) -> float:
        """Return one standard error of the mean difference, std(ddof=1) / sqrt(N); 0 for a single example."""
        if self.num_examples < 2:
            return 0.0
        total, squares = self.num_gained - self.num_lost, self.num_gained + self.num_lost
        variance = (squares - total**2 / self.num_examples) / (self.num_examples - 1)
        return math.sqrt(variance / self.num_examples)

    @property
    def is_worse(self) -> bool:
        """Return True if the mean difference is below -tolerance.

        Squared and multiplied out, N drops out: what is left is that McNemar's statistic
        (lost - gained)² / (lost + gained) (Psychometrika 12, 1947) is above 1. It is computed in whole
        numbers, because a single example lost is on the boundary, where rounding would decide.
        """
        net_lost = self.num_lost - self.num_gained
        if self.num_examples < 2:
            return net_lost > 0
        return net_lost > 0 and net_lost**2 > self.num_lost + self.num_gained


def compare(before: np.ndarray, after: np.ndarray) -> Comparison:
    """Return how the predictions of two models differ.

    Args:
        before: bool [N], True where the model in use is right about an example.
        after: bool [N], the same of the published model.
    """
    return Comparison(len(before), int((after & ~before).sum()), int((before & ~after).sum()))


def objection(before: np.ndarray, after: np.ndarray) -> str:
    """Return in one line why the published model should not be used; empty: it does no worse.

    The arguments are those of `compare`.
    """
    comparison = compare(before, after)
    if not comparison.is_worse:
        return ""
    return (
        f"accuracy {before.mean():.4f} → {after.mean():.4f} on {len(before)} held-out examples,"
        f" worse by more than the tolerance {comparison.tolerance:.4f}"
    )
