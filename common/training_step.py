"""A step of the optimizer, on one rank: forward, loss, backward, and the change of the weights.

A step can be recorded as a CUDA graph: it keeps its state in place, and waits for the device nowhere.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ecavg.common.batches import Batch, DeviceData
from ecavg.common.config import TrainingConfig
from ecavg.common.evaluation import laid_out, place
from ecavg.common.precision import Precision
from ecavg.common.sharding import class_of, is_sharded
from ecavg.common.tasks.task import Task

# PyTorch 2.13 has given this argument a new name, and warns of the old one.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class TrainingStep:
    """A step of the optimizer, and all that it needs and changes but the batch.

    Attributes:
        optimizer: the optimizer.
        is_fused: True if the optimizer is a fused one.
        epoch_loss: the sum of the loss over this rank's examples, for the caller to set to zero; float64.
        reported_loss: the same, once more.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DeviceData,
        config: TrainingConfig,
        *,
        task: Task,
        precision: Precision,
        world_size: int,
    ) -> None:
        self._data, self._config, self._task = data, config, task
        self._world_size = world_size
        device = data.device
        # Without a cache, a graph does not depend on what was computed before it.
        self._autocast = torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=precision == "bfloat16",
            cache_enabled=device.type == "cpu",
        )
        self._memory_format = place(model, device)
        # The fused kernels know floating-point parameters only, and complex ones are none.
        are_floats = all(parameter.is_floating_point() for parameter in model.parameters())
        # Neither do they know sharded ones, all of them.
        self.is_fused = are_floats and not is_sharded(model)
        self.optimizer = _make_optimizer(model, config, self.is_fused, device)
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)
        self.epoch_loss, self.reported_loss = self._losses.unbind()
        self._model = model.train()
        # The ranks' gradients are averaged by the sharded model itself, or by DistributedDataParallel.
        self._shares_buffers = is_sharded(model) and _has_shared_buffers(model)
        if world_size > 1 and not is_sharded(model):
            device_ids = [device] if device.type == "cuda" else None
            sync_buffers: Any = {_SYNC_BUFFERS: _has_shared_buffers(model)}
            self._model = DistributedDataParallel(model, device_ids, **sync_buffers)

    def changed_tensors(self) -> list[Tensor]:
        """Return the tensors besides the model's that a step changes."""
        states = self.optimizer.state.values()
        return [self._losses, *(each for state in states for each in state.values() if torch.is_tensor(each))]

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                # A recorded step reads the number from this tensor.
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def take(self, batch: Sequence[Tensor], batch_size: int) -> None:
        """Take one step.

        Args:
            batch: the fields of a `Batch`; this rank's part.
            batch_size: the number of examples over all ranks.
        """
        batch = Batch(*batch)
        if self._shares_buffers:
            _share_buffers(self._model)
        x = laid_out(batch.augmented(self._data, self._config.augment), self._memory_format)
        with self._autocast:
            outputs = self._model(x)
            loss_sum = self._loss_sum(self._task.outputs(outputs), batch.targets)
        if self._world_size > 1:
            loss_sum = loss_sum + _touch_others(outputs)
        self.optimizer.zero_grad()
        # Gradients are averaged over ranks: times world_size it is the mean over the batch.
        (loss_sum * (self._world_size / batch_size)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._losses += loss_sum.detach()

    def _loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # The three digits of bfloat16 are too few for log-probabilities.
        return self._task.loss_sum(outputs.float(), targets, self._config.label_smoothing)


def _has_shared_buffers(model: nn.Module) -> bool:
    """Return True if the ranks must have the same buffers.

    BatchNorm's running statistics are not read while a model is trained, and those of rank 0 are kept.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    statistics = {id(each) for norm in model.modules() if class_of(norm) in kinds for each in norm.buffers()}
    return any(id(each) not in statistics for each in model.buffers())


def _share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, as DistributedDataParallel does before a forward."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def _touch_others(outputs: Any) -> Tensor | float:
    """Return zero, computed from all auxiliary outputs of a model.

    Ranks that train together wait for a gradient of every parameter, also of those behind outputs that do not
    count. These gradients become zero.
    """
    if isinstance(outputs, Tensor):
        return 0.0
    others = outputs.values() if isinstance(outputs, Mapping) else outputs
    return sum((0.0 * each.float().sum() for each in others if isinstance(each, Tensor)), 0.0)


def _has_tensor_rate(device: torch.device) -> bool:
    """Return True if the learning rate is to be a tensor, as a recorded step needs it."""
    return device.type == "cuda"


def _make_optimizer(
    model: nn.Module, config: TrainingConfig, is_fused: bool, device: torch.device
) -> torch.optim.Optimizer:
    parameters, decay = list(model.parameters()), config.weight_decay
    # An optimizer that is not fused would read the tensor in every step, and wait for it.
    is_recordable = is_fused and _has_tensor_rate(device)
    rate: Any = config.learning_rate
    if is_recordable:
        rate = torch.tensor(rate, device=device)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            weight_decay=decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=is_fused,
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay, fused=is_fused, capturable=is_recordable)
