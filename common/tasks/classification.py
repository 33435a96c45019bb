"""Classification: one class an example. The figure is the accuracy.

Shapes: B examples of a batch, N of a data set, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ecavg.common.tasks.task import ClassFigure, Figure, Task


class Classification(Task):
    """Cross-entropy between the outputs, logits [B, K], and the targets, int64 [B]."""

    metric = "accuracy"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of each example in nats, float32 [B]."""
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)

    def loss_sum(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the sum of the losses, float32 []; one kernel does it, whose bits trainings depend on."""
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=label_smoothing)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 for each example that is right and 0 for the others, float32 [B]."""
        return _are_right(outputs, targets).float()

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each example its class, and whether it is right: int64 [B, 2]."""
        return torch.stack([targets, _are_right(outputs, targets).long()], 1)

    def figure(self, tally: Tensor) -> Figure:
        """Return the accuracy, and that of each class."""
        labels_N, right_N = tally.unbind(1)
        counts = torch.bincount(labels_N)
        right = torch.bincount(labels_N[right_N.bool()], minlength=len(counts))
        pairs = enumerate(zip(counts.tolist(), right.tolist(), strict=True))
        return Figure(
            int(right_N.sum()) / len(tally),
            {label: ClassFigure(count, good / count) for label, (count, good) in pairs if count},
        )


def _are_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return True for each example whose target has the largest output; NaN is right about nothing."""
    return (outputs.argmax(1) == targets) & ~outputs.isnan().any(1)
