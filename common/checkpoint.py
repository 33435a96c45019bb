"""Checkpoints: the last finished epoch of a training on disk, from where a restarted process goes on.

A checkpoint is one safetensors file: the model's parameters and buffers, the optimizer's tensors, and in the
metadata which training it belongs to and how far that has come. Random choices are derived for each epoch
from the seed, and the learning rate from the step, so neither has a state to keep.

Ranks that train together have the same weights after each step. The first rank of each machine writes a file,
so that the ranks can go on without any of the machines. Nothing in a file depends on the number of ranks.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ecavg.common.config import FrozenModel
from ecavg.common.faults import Point, crash_point
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.sharding import copy_whole, whole
from ecavg.common.weights import StateDict, write_state_dict

# So much time is between two checkpoints: where epochs are shorter, writing would slow them down.
CHECKPOINT_SECONDS = 5.0

_KEY = "ecavg.checkpoint"
_MODEL, _OPTIMIZER, _ALSO = "model.", "optimizer.", "also."

log = structlog.get_logger()


class Kept(Protocol):
    """What a training changes besides the model and the optimizer."""

    def tensors(self) -> StateDict:
        """Return all that has to be kept, by names without a meaning."""

    def set_tensors(self, tensors: StateDict) -> None:
        """Become what `tensors` has returned."""


class CheckpointFile(NamedTuple):
    """The file that keeps the last finished epoch of a training, on each machine that trains."""

    path: Path
    # At least so much time is between two checkpoints, and before the first.
    seconds: float = CHECKPOINT_SECONDS
    # What names the weights and the examples; empty: their digest does.
    subject: str = ""
    # What the training changes besides the model and the optimizer, by `after_step`.
    also: Kept | None = None


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
    """The file that keeps the last finished epoch of one training; every rank has an object of its own.

    Args:
        file: where the file is, and how often it is written.
        training: fingerprint of all that its result depends on; a file with another one is ignored. That of
            rank 0 counts.
        model: with the weights that the training starts from.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        file: CheckpointFile,
        training: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks = ALONE,
    ) -> None:
        self._path, self._also = file.path, file.also
        self._training = ranks.share(training)
        self._model, self._optimizer = model, optimizer
        self._ranks = ranks
        self._seconds = file.seconds
        self._due = time.monotonic() + file.seconds

    def restore(self) -> Finished:
        """Set model and optimizer as they were after the last checkpoint, and return what is finished.

        Without a file, or with a damaged one or another training's, nothing is changed and nothing finished.
        Of several machines' files, the one with the most epochs counts, and its rank sends it to the others.
        """
        finished, tensors = self._found() if self._ranks.local_rank == 0 else (Finished(), {})
        num_epochs = self._ranks.gather(finished.num_epochs)
        if not max(num_epochs):
            return Finished()
        source = num_epochs.index(max(num_epochs))
        finished = Finished.model_validate_json(self._ranks.share(finished.model_dump_json(), source))
        self._set(self._ranks.share_each(tensors, source))
        log.info("training_resumed", finished_epochs=finished.num_epochs)
        return finished

    def epoch_finished(self, finished: Finished) -> None:
        """Write a checkpoint if it is time for one; a disk that does not allow it is no reason to stop."""
        # Each rank has a clock of its own, and that of rank 0 counts.
        if not self._ranks.share("due" if time.monotonic() >= self._due else ""):
            return
        # BatchNorm's statistics are each rank's own, and those of rank 0 are kept.
        buffers = self._ranks.share_tensors(dict(self._model.named_buffers()))
        tensors = self._tensors(buffers)
        if self._ranks.local_rank == 0:
            self._write(finished, tensors)
        self._due = time.monotonic() + self._seconds

    def _found(self) -> tuple[Finished, StateDict]:
        """Return what this machine's file has; nothing is finished if it is not to be used."""
        nothing = Finished(), StateDict()
        if not self._path.exists():
            return nothing
        try:
            label, tensors = _read(self._path)
        except (OSError, SafetensorError, ValidationError, KeyError) as error:
            log.warning("checkpoint_ignored", path=str(self._path), reason=f"damaged: {error}")
            return nothing
        if label.digest != _digest(label, tensors):
            log.warning("checkpoint_ignored", path=str(self._path), reason="damaged: its digest differs")
            return nothing
        if label.training != self._training:
            log.warning("checkpoint_ignored", path=str(self._path), reason="it is of another training")
            return nothing
        return label.finished, tensors

    def _write(self, finished: Finished, tensors: StateDict) -> None:
        label = _Label(training=self._training, finished=finished, digest="")
        label = label.model_copy(update={"digest": _digest(label, tensors)})
        try:
            self._replace(tensors, {_KEY: label.model_dump_json()})
            crash_point(Point.AGENT_EPOCH_SAVED)
        except OSError as error:
            log.warning("checkpoint_not_written", path=str(self._path), reason=str(error))

    def _replace(self, tensors: StateDict, metadata: Mapping[str, str]) -> None:
        if self._ranks.world_size == 1:
            write_state_dict(tensors, self._path, metadata=metadata)
            return
        # Machines that share the folder write the same bytes at the same time.
        own_path = self._path.with_name(f"{self._ranks.rank}.safetensors")
        write_state_dict(tensors, own_path, metadata=metadata)
        own_path.replace(self._path)

    def _tensors(self, buffers: StateDict) -> StateDict:
        kept = {**_tensors_of(self._model), **buffers}
        tensors = {_MODEL + name: tensor for name, tensor in kept.items()}
        also = self._also.tensors() if self._also else {}
        tensors |= {_ALSO + name: tensor for name, tensor in also.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"{_OPTIMIZER}{index}.{name}"] = value
        # All ranks take part in making a sharded tensor whole, one after the other, and only writers keep it.
        kept = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())
            if self._ranks.local_rank == 0:
                kept[name] = gathered.cpu().contiguous()
        return kept

    def _set(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Set all that is kept. The tensors come one at a time, and of a sharded one only a part stays."""
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        own, also = _tensors_of(self._model), StateDict()
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors:
            kind, name = key.split(".", 1)
            if kind + "." == _MODEL:
                copy_whole(own[name], tensor)
            elif kind + "." == _ALSO:
                also[name] = tensor
            else:
                index, name = name.split(".", 1)
                state.setdefault(int(index), {})[name] = _laid_out_as(parameters[int(index)], tensor)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        if self._also:
            self._also.set_tensors(also)


def fingerprint(settings: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> str:
    """Return the SHA-256, hexadecimal, of the settings (as JSON), the initial weights and the data."""
    data = {"data.inputs": inputs, "data.targets": targets}
    return _hash(json.dumps(settings), {**_tensors_of(model), **data})


def fingerprint_of(settings: Any, subject: str) -> str:
    """Return the SHA-256, hexadecimal, of the settings (as JSON) and of what names weights and data."""
    return _hash(f"{json.dumps(settings)} {subject}", {})


def _tensors_of(model: nn.Module) -> StateDict:
    """Return parameters and buffers; also those that a state_dict leaves out, and tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the parameter's memory format, because fused optimizers walk through memory."""
    if tensor.shape != parameter.shape:
        return tensor
    like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    copy_whole(like, tensor)
    return like


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
        data = whole(tensor.detach()).cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
