"""Regression: numbers. The figure is R².

Shapes: B examples of a batch, N of a data set, D numbers an example.
"""

import torch
from torch import Tensor

from ecavg.common.dataset import DatasetSpec
from ecavg.common.tasks.task import Figure, Task


class Regression(Task):
    """The squared error between outputs and targets, both float32 [B, D].

    A model learns targets with the mean and deviation of `[run.targets]`: its outputs are numbers of size 1
    around 0, which `predictions` brings into the unit of the targets.
    """

    metric = "R²"

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__(spec)
        # Mean and deviation on each device: a step that is recorded cannot bring them there.
        self._scalings: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the outputs in the unit of the targets, [B, …]."""
        mean, std = self._scaling(outputs)
        return outputs * std + mean

    # Numbers are no labels, so there is nothing to smooth: the configuration refuses it.
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG002
        """Return the mean squared error of each example in squared deviations of targets, float32 [B]."""
        mean, std = self._scaling(outputs)
        return (outputs - (targets - mean) / std).square().flatten(1).mean(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative mean absolute error of each example in the targets' unit, float32 [B]."""
        return -(self.predictions(outputs) - targets).abs().flatten(1).mean(1)

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return prediction and target of each example, float32 [B, 2, …]."""
        return torch.stack([self.predictions(outputs), targets], 1)

    def figure(self, tally: Tensor) -> Figure:
        """Return R², the mean over the D numbers of 1 - squared errors / squares about the mean.

        Where a number is the same in all examples, R² is 1 for a model without any error, and else 0.
        """
        predictions_ND, targets_ND = (side.flatten(1) for side in tally.double().unbind(1))
        errors_D = (predictions_ND - targets_ND).square().sum(0)
        spread_D = (targets_ND - targets_ND.mean(0)).square().sum(0)
        # Errors that are not finite leave no R² in either case.
        of_equal_D = (errors_D == 0) + 0 * errors_D
        r2_D = torch.where(spread_D > 0, 1 - errors_D / spread_D.clamp_min(1e-300), of_equal_D)
        absolute = (predictions_ND - targets_ND).abs().mean().item()
        return Figure(r2_D.mean().item(), figures={"mean_absolute_error": absolute})

    def _scaling(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation for each index of the first axis of the targets."""
        if like.device not in self._scalings:
            described = self.spec.targets
            along_first = (-1, *(1 for _ in described.shape[1:]))
            self._scalings[like.device] = (
                torch.tensor(described.mean or (0.0,), device=like.device).view(along_first),
                torch.tensor(described.std or (1.0,), device=like.device).view(along_first),
            )
        return self._scalings[like.device]
