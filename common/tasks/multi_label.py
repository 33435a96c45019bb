"""Multi-label classification: any number of classes an example. The figure is the mean average precision.

Shapes: B examples of a batch, N of a data set, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ecavg.common.tasks.task import ClassFigure, Figure, Task


class MultiLabel(Task):
    """Binary cross-entropy between outputs, logits [B, K], and targets, int64 [B, K] of 0 and 1."""

    metric = "mean average precision"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean binary cross-entropy of each example in nats, float32 [B]."""
        wanted = targets.float() * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of the classes that are right for each example, float32 [B]."""
        return ((outputs > 0) == targets.bool()).float().mean(1)

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return output and target of each class, float32 [B, K, 2]."""
        return torch.stack([outputs, targets.float()], 2)

    def figure(self, tally: Tensor) -> Figure:
        """Return the mean of the average precisions of the classes that some example has.

        The average precision is the sum of precision times the increase of recall over all thresholds
        (scikit-learn's `average_precision_score`).
        """
        by_class = {}
        for label, (outputs_N, targets_N) in enumerate(tally.double().permute(1, 2, 0)):
            if num_examples := int(targets_N.sum()):
                by_class[label] = ClassFigure(num_examples, _average_precision(outputs_N, targets_N))
        scores = [each.score for each in by_class.values()]
        return Figure(sum(scores) / len(scores) if scores else 0.0, by_class)


def _average_precision(outputs_N: Tensor, targets_N: Tensor) -> float:
    """Return the average precision of a class that some example has; equal outputs count as one step."""
    order = outputs_N.argsort(descending=True, stable=True)
    ranked, right = outputs_N[order], targets_N[order].cumsum(0)
    is_last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    places = torch.arange(1, len(ranked) + 1)[is_last]
    right = right[is_last]
    gained = right.diff(prepend=right.new_zeros(1))
    return float((gained * right / places).sum() / right[-1])
