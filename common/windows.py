"""The built-in models for windows of a series.

Shapes: B windows of a batch, C channels, T steps, H hidden units.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn


def cnn1d(num_channels: int, hidden_units: int, output_shape: Sequence[int]) -> nn.Module:
    """Return a small convolutional network for windows [B, C, T], T of at least 4, of any length."""
    return nn.Sequential(
        nn.Conv1d(num_channels, hidden_units, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(hidden_units, hidden_units, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        *head(hidden_units, output_shape),
    )


def head(num_features: int, output_shape: Sequence[int]) -> list[nn.Module]:
    """Return the layers that make outputs of this shape from features [B, num_features]."""
    linear = nn.Linear(num_features, math.prod(output_shape))
    return [linear] if len(output_shape) == 1 else [linear, nn.Unflatten(1, tuple(output_shape))]


class Gru(nn.Module):
    """A network of gated recurrent units (Cho et al., arXiv 1406.1078) for windows [B, C, T]."""

    def __init__(self, num_channels: int, hidden_units: int, output_shape: Sequence[int]) -> None:
        super().__init__()
        self.gru = nn.GRU(num_channels, hidden_units, batch_first=True)
        self.head = nn.Sequential(*head(hidden_units, output_shape))

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return the outputs, from the hidden state after the last step."""
        states_BTH, _ = self.gru(x_BCT.transpose(1, 2))
        outputs: Tensor = self.head(states_BTH[:, -1])
        return outputs
