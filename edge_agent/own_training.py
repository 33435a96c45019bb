"""A training loop of the user's own, in the place of this project's: what it is given, and what it gives.

Shapes: N examples to train on.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ecavg.common.batches import DeviceData
from ecavg.common.config import TrainingConfig
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import DivergedError, RunError
from ecavg.common.mapped import in_memory
from ecavg.common.training import Examples, OnStep, StepReport
from ecavg.common.weights import copy_into

Purpose = Literal["pretrain", "adapt"]

# Called with the step, from 1 on, the number of all steps, and the loss of the step.
Report = Callable[[int, int, float], None]


class Start(NamedTuple):
    """What a training starts from, beside the weights, which are the model's."""

    # The round, from 1 on.
    round: int
    # "pretrain" for the round; "adapt" for a published model that does worse here than the one in use.
    purpose: Purpose
    # A number for all that chance decides. PyTorch's own random state is set to it already.
    seed: int
    # The device to train on; the model is there.
    device: torch.device
    # What the run asks for: epochs, batch_size, learning_rate and so on. The loop may do otherwise.
    config: TrainingConfig


class Data(Dataset[tuple[Tensor, Tensor]]):
    """The examples to train on, for a `torch.utils.data.DataLoader`.

    An item is an input as the model takes it, float32 and normalised (int64 inputs stay as they are), and its
    target. Both are on the CPU.

    Attributes:
        inputs: all inputs as they are stored, [N, …], such as uint8 [N, C, H, W].
        targets: all targets, [N, …], such as labels, int64 [N].
    """

    def __init__(self, examples: Examples, spec: DatasetSpec) -> None:
        self.inputs, self.targets = map(in_memory, examples)
        self._normalise = DeviceData(self.inputs[:0], spec, torch.device("cpu")).normalise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.normalise(self.inputs[index, None])[0], self.targets[index]

    def normalise(self, inputs: Tensor) -> Tensor:
        """Return some of `inputs`, [B, …], as the model takes them."""
        return self._normalise(inputs)


# Takes a model with the weights to start from, the data, what else it starts from, and what to call at each
# step; returns the weights, under the names of the model's state_dict. It is called in a thread.
OwnTraining = Callable[[nn.Module, Data, Start, Report], Mapping[str, Tensor]]


def train_as_own(own: OwnTraining, model: nn.Module, data: Data, start: Start, on_step: OnStep) -> None:
    """Train a model by the user's own loop; the global random state is left as it was.

    Whatever else the loop raises is the user's, and passes as it is.

    Raises:
        RunError: the loop returned no weights, or those of another model.
        DivergedError: some of the weights are not finite.
    """

    def report(step: int, num_steps: int, loss: float) -> None:
        on_step(StepReport(step, num_steps, float(loss)))

    model.to(start.device).train()
    with torch.random.fork_rng(devices=[start.device] if start.device.type == "cuda" else []):
        torch.manual_seed(start.seed)
        weights = own(model, data, start, report)
    if not isinstance(weights, Mapping):
        raise RunError(
            f"the training function returned {type(weights).__name__}: have it return the weights,"
            " such as model.state_dict()"
        )
    copy_into(model, weights)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DivergedError(f"the training function made {name} not finite: lower its learning rate")
    model.zero_grad()
