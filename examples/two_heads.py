"""A user's own task, model and data source: windows of a vibration sensor, with a class and a number.

The network has two heads. One says which of two bearings is worn, the other how much.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecavg.common.tasks.task import Figure, Task

NUM_CLASSES = 2


def windows(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return windows, float32 [N, 1, 32], and targets, float32 [N, 2]: the class and the wear, 0 to 1."""
    if split == "test":
        return None
    rng = np.random.default_rng(0)
    bearing, wear = rng.integers(0, NUM_CLASSES, 200), rng.random(200)
    phase = rng.random((200, 1)) * 2 * np.pi + np.arange(32) * (0.4 + 0.8 * bearing[:, None])
    signal = (0.2 + wear[:, None]) * np.sin(phase) + 0.1 * rng.standard_normal((200, 32))
    return signal[:, None].astype(np.float32), np.stack([bearing, wear], 1).astype(np.float32)


class Net(nn.Module):
    """A convolution whose features two heads share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(channels, 16, 9, padding=4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        )
        self.bearing, self.wear = nn.Linear(16, NUM_CLASSES), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of the class and the wear of each window."""
        features = self.features(x)
        return {"bearing": self.bearing(features), "wear": self.wear(features)}


def net(input_shape: tuple[int, ...], output_shape: tuple[int, ...] | None) -> nn.Module:
    """Return the network; the output shape is None, because only the task knows it."""
    assert output_shape is None
    return Net(input_shape[0])


class TwoHeads(Task):
    """The class of a window and a number, learnt together."""

    metric = "half accuracy, half closeness"

    def outputs(self, of_model: Any) -> Tensor:
        """Return the outputs of both heads side by side, [B, NUM_CLASSES + 1]."""
        return torch.cat([of_model["bearing"], of_model["wear"]], 1)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of the class and the squared error of the wear, added up, [B]."""
        logits, wear = outputs[:, :NUM_CLASSES], outputs[:, NUM_CLASSES]
        classes = F.cross_entropy(
            logits, targets[:, 0].long(), reduction="none", label_smoothing=label_smoothing
        )
        return classes + (wear - targets[:, 1]).square()

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of 1 for the right class, else 0, and of 1 less the error of the wear, [B]."""
        is_right = outputs[:, :NUM_CLASSES].argmax(1) == targets[:, 0].long()
        closeness = 1 - (outputs[:, NUM_CLASSES] - targets[:, 1]).abs()
        return (is_right.float() + closeness) / 2

    def figure(self, tally: Tensor) -> Figure:
        """Return the mean of the scores."""
        return Figure(tally.double().mean().item())
