"""Checkpoints: the last finished epoch of a training on disk, from where a restarted process goes on.

A checkpoint is one safetensors file: the model's parameters and buffers, the optimizer's tensors, and in the
metadata which training it belongs to and how far that has come. Random choices are derived for each epoch
from the seed, and the learning rate from the step, so neither has a state to keep.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ecavg.common.config import FrozenModel
from ecavg.common.faults import Point, crash_point
from ecavg.common.weights import StateDict, write_state_dict

# So much time is between two checkpoints: where epochs are shorter, writing would slow them down.
CHECKPOINT_SECONDS = 5.0

_KEY = "ecavg.checkpoint"
_MODEL, _OPTIMIZER = "model.", "optimizer."

log = structlog.get_logger()


class Finished(FrozenModel):
    """The finished part of a training."""

    num_epochs: int = 0
    # The mean loss of the last epoch.
    loss: float = math.nan


class _Label(FrozenModel):
    """The metadata of a checkpoint."""

    # The fingerprint of the training.
    training: str
    finished: Finished
    # The digest of the tensors and of the fields above: the format itself has no checksum.
    digest: str


class Checkpoints:
    """The file that keeps the last finished epoch of one training.

    Args:
        training: fingerprint of all that its result depends on; a file with another one is ignored.
        model: with the weights that the training starts from.
        seconds: least time between two checkpoints, and before the first.
    """

    def __init__(
        self,
        path: Path,
        training: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        seconds: float,
    ) -> None:
        self._path, self._training = path, training
        self._model, self._optimizer = model, optimizer
        self._seconds = seconds
        self._due = time.monotonic() + seconds

    def restore(self) -> Finished:
        """Set model and optimizer as they were after the last checkpoint, and return what is finished.

        Without a file, or with a damaged one or another training's, nothing is changed and nothing finished.
        """
        if not self._path.exists():
            return Finished()
        try:
            label, tensors = _read(self._path)
        except (OSError, SafetensorError, ValidationError, KeyError) as error:
            log.warning("checkpoint_ignored", path=str(self._path), reason=f"damaged: {error}")
            return Finished()
        if label.digest != _digest(label, tensors):
            log.warning("checkpoint_ignored", path=str(self._path), reason="damaged: its digest differs")
            return Finished()
        if label.training != self._training:
            log.warning("checkpoint_ignored", path=str(self._path), reason="it is of another training")
            return Finished()
        self._set_model(tensors)
        self._set_optimizer(tensors)
        log.info("training_resumed", finished_epochs=label.finished.num_epochs)
        return label.finished

    def epoch_finished(self, finished: Finished) -> None:
        """Write a checkpoint if it is time for one; a disk that does not allow it is no reason to stop."""
        if time.monotonic() < self._due:
            return
        tensors = self._tensors()
        label = _Label(training=self._training, finished=finished, digest="")
        label = label.model_copy(update={"digest": _digest(label, tensors)})
        try:
            write_state_dict(tensors, self._path, metadata={_KEY: label.model_dump_json()})
            crash_point(Point.AGENT_EPOCH_SAVED)
        except OSError as error:
            log.warning("checkpoint_not_written", path=str(self._path), reason=str(error))
        self._due = time.monotonic() + self._seconds

    def _tensors(self) -> StateDict:
        tensors = {_MODEL + name: tensor for name, tensor in _tensors_of(self._model).items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"{_OPTIMIZER}{index}.{name}"] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def _set_model(self, tensors: StateDict) -> None:
        with torch.no_grad():
            for name, tensor in _tensors_of(self._model).items():
                tensor.copy_(tensors[_MODEL + name])

    def _set_optimizer(self, tensors: StateDict) -> None:
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(_OPTIMIZER):
                index, name = key.removeprefix(_OPTIMIZER).split(".", 1)
                state.setdefault(int(index), {})[name] = _laid_out_as(parameters[int(index)], tensor)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def fingerprint(settings: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> str:
    """Return the SHA-256, hexadecimal, of the settings (as JSON), the initial weights and the data."""
    data = {"data.inputs": inputs, "data.targets": targets}
    return _hash(json.dumps(settings), {**_tensors_of(model), **data})


def _tensors_of(model: nn.Module) -> StateDict:
    """Return parameters and buffers; also those that a state_dict leaves out, and tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the parameter's memory format, because fused optimizers walk through memory."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _read(path: Path) -> tuple[_Label, StateDict]:
    with safe_open(path, framework="pt") as file:
        label = _Label.model_validate_json((file.metadata() or {})[_KEY])
        return label, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _digest(label: _Label, tensors: Mapping[str, Tensor]) -> str:
    return _hash(f"{label.training} {label.finished.model_dump_json()}", tensors)


def _hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
