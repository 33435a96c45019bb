"""The exponential moving average of a model's parameters over the steps of a training.

Where the learning rate does not end near zero, the last steps jump about a minimum, and the mean of many of
them is nearer to it (Polyak and Juditsky, 1992; arXiv 2411.18704).
"""

import torch
from torch import Tensor, nn

from ecavg.common.sharding import copy_whole, local, whole
from ecavg.common.weights import StateDict


class MovingAverage:
    """The exponential moving average of the parameters that a training changes.

    After each step, a ← decay · a + (1 - decay) · θ. The average begins with the parameters after the first
    step. It is kept on the model's device, in float32 where the parameters have fewer bits.

    Args:
        model: the model that is trained.
        decay: the weight of the average so far, from 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        # In the order of `_parameters`; empty before the first step.
        self._averages: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        parameters = self._parameters()
        if not self._averages:
            self._averages = [torch.empty_like(each, dtype=_at_least_float32(each)) for each in parameters]
            torch._foreach_copy_(_own(self._averages), _own(parameters))
            return
        averages = _own(self._averages)
        exact = [each.to(average.dtype) for each, average in zip(_own(parameters), averages, strict=True)]
        torch._foreach_lerp_(averages, exact, 1 - self._decay)

    @torch.no_grad()
    def load(self) -> bool:
        """Set the model's parameters to the average; return False, and leave them, if there was no step."""
        if not self._averages:
            return False
        torch._foreach_copy_(_own(self._parameters()), _own(self._averages))
        return True

    def tensors(self) -> StateDict:
        """Return the average, for a checkpoint."""
        return {str(number): tensor for number, tensor in enumerate(self._averages)}

    @torch.no_grad()
    def set_tensors(self, tensors: StateDict) -> None:
        """Go on with an average that `tensors` has returned."""
        parameters = self._parameters()
        self._averages = [torch.empty_like(each, dtype=_at_least_float32(each)) for each in parameters]
        for number, average in enumerate(self._averages):
            copy_whole(average, tensors[str(number)])

    def gathered(self, model: nn.Module | None) -> "MovingAverage | None":
        """Return the average of a sharded model as that of a whole one; every rank calls this.

        Args:
            model: the whole model; None: this rank only helps.
        """
        tensors = {name: whole(each) for name, each in self.tensors().items()}
        if model is None:
            return None
        average = MovingAverage(model, self._decay)
        if tensors:
            average.set_tensors(tensors)
        return average

    def _parameters(self) -> list[Tensor]:
        """Return the parameters that are trained: the others stay as they are."""
        return [each.detach() for each in self._model.parameters() if each.requires_grad]


def _own(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, in the same memory."""
    return [local(each) for each in tensors]


def _at_least_float32(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's average."""
    return torch.promote_types(parameter.dtype, torch.float32)
