"""Segmentation: one class a pixel. The figure is the mean intersection over union.

Shapes: B examples of a batch, N of a data set, K classes, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ecavg.common.tasks import IGNORED
from ecavg.common.tasks.task import ClassFigure, Figure, Task


class Segmentation(Task):
    """Cross-entropy between outputs, logits [B, K, H, W], and targets, int64 [B, H, W]; -1 does not count."""

    metric = "mean intersection over union"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of each example's pixels in nats, float32 [B]."""
        losses = F.cross_entropy(
            outputs, targets, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
        )
        return losses.flatten(1).sum(1) / (targets != IGNORED).flatten(1).sum(1).clamp_min(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean intersection over union of each example, over the classes in it, float32 [B]."""
        shared_BK, union_BK, _ = self.tally(outputs, targets).unbind(1)
        is_there = union_BK > 0
        ratios_BK = shared_BK / union_BK.clamp_min(1)
        return ratios_BK.sum(1) / is_there.sum(1).clamp_min(1)

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return for each class how many pixels are in both, in either, and in the target, [B, 3, K]."""
        counts = (targets != IGNORED).flatten(1)
        found_BKP, wanted_BKP = (
            F.one_hot(classes.flatten(1).clamp_min(0), self.spec.num_classes).bool() & counts[:, :, None]
            for classes in (outputs.argmax(1), targets)
        )
        shared, union = found_BKP & wanted_BKP, found_BKP | wanted_BKP
        return torch.stack([each.sum(1) for each in (shared, union, wanted_BKP)], 1)

    def figure(self, tally: Tensor) -> Figure:
        """Return the mean over the classes of the intersection over union of all pixels, and that of each.

        Classes that neither the targets nor the model has do not count.
        """
        shared_K, union_K, wanted_K = tally.sum(0).unbind(0)
        num_examples_K = (tally[:, 2] > 0).sum(0)
        scores = [
            shared / union for shared, union in zip(shared_K.tolist(), union_K.tolist(), strict=True) if union
        ]
        by_class = {
            label: ClassFigure(int(num_examples_K[label]), shared_K[label].item() / union_K[label].item())
            for label in torch.nonzero(wanted_K).flatten().tolist()
        }
        return Figure(sum(scores) / len(scores) if scores else 0.0, by_class)
