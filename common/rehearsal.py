"""The rehearsal of a run's model finds early what would fail only in training, or differ only on a device.

The server rehearses the model before the run begins, and each agent before it reads its data. The result is
the probe: some outputs of the model for known weights and known inputs. If an agent's probe differs from the
server's, the model is another one there, although its state_dict has the same names and shapes.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from ecavg.common.batches import DeviceData
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import Inputs, Targets
from ecavg.common.errors import DivergedError, UsageError
from ecavg.common.models import build_model, errors_of_model
from ecavg.common.ranks import ALONE
from ecavg.common.tasks.task import Task, task_of
from ecavg.common.training import Examples, Recipe, train
from ecavg.common.weights import StateDict, copy_into, dtype_name

# Two examples are the fewest with which every kind of layer can be trained.
NUM_EXAMPLES = 2
# The probe has the logits of so many outputs for each input, at most.
NUM_PROBED = 8
# The outputs may differ by this share of the largest one, because devices round differently. Rounding to
# float32 changes the outputs of torchvision's models by at most 6e-6, and another epsilon in their norms by
# more than 1e-3.
TOLERANCE = 1e-3

Probe = tuple[float, ...]


def rehearse(run: RunConfig, allowed_factories: Collection[str] | None = None) -> Probe:
    """Take a training step with the run's model, and pass its weights on to another model, on the CPU.

    Args:
        run: the configuration that names the model and the dataset.
        allowed_factories: the user's own factories that may be imported; None allows any factory.

    Returns:
        The probe; it is empty for a model that gives no finite outputs for weights that were not trained.

    Raises:
        UsageError: the model cannot be built, trained, stored or passed on; the message says why.
    """
    model = build_model(run, allowed_factories=allowed_factories)
    _check_state(model, run)
    task = task_of(run, allowed_factories)
    _check_training(model, run, task)
    ours, theirs = (build_model(run, allowed_factories=allowed_factories) for _ in range(2))
    known = ours.state_dict()
    _fill(known)
    if not all(map(torch.equal, known.values(), ours.state_dict().values())):
        raise UsageError(f"model {run.model!r}: its state_dict has copies, so no weights can be loaded by it")
    copy_into(theirs, model.state_dict())
    if not _agree(model, theirs, task):
        raise UsageError(
            f"model {run.model!r} is not determined by its state_dict and the run's seed: after a training"
            " step, another model with its state_dict gives different outputs. Register all that changes in"
            " training as parameters, or as buffers with persistent=True"
        )
    copy_into(theirs, known)
    if not _agree(ours, theirs, task):
        raise UsageError(
            f"model {run.model!r} is not determined by its state_dict and the run's seed: two of them with"
            " one state_dict give different outputs. Register what is drawn at random as a buffer, with"
            " persistent=True, or draw it from PyTorch's generator"
        )
    probe = _outputs(ours, task)
    return tuple(probe.flatten(1)[:, :NUM_PROBED].flatten().tolist()) if probe.isfinite().all() else ()


def check_probe(run: RunConfig, own: Probe, servers: Sequence[float]) -> None:
    """Check that this device's model is the server's; nothing is compared where either has no probe.

    Raises:
        UsageError: the model is another one here.
    """
    if own and servers and not _are_alike(servers, own):
        raise UsageError(
            f"model {run.model!r} gives other outputs here than on the server, with the same weights: its"
            " state_dict leaves out a part that differs, or its code is another version. Install the same"
            " code and PyTorch on both, and register such a part as a buffer with persistent=True"
        )


def _agree(model: nn.Module, other: nn.Module, task: Task) -> bool:
    """Return True if both models give the same outputs, or if the first gives none that are finite."""
    first, second = (_outputs(each, task) for each in (model, other))
    return not first.isfinite().all() or _are_alike(first.flatten().tolist(), second.flatten().tolist())


def _are_alike(expected: Sequence[float], found: Sequence[float]) -> bool:
    largest = max(map(abs, expected), default=0.0)
    return len(expected) == len(found) and all(
        math.isclose(one, other, rel_tol=0, abs_tol=TOLERANCE * largest)
        for one, other in zip(expected, found, strict=True)
    )


def _check_state(model: nn.Module, run: RunConfig) -> None:
    """Check that the state_dict can be stored, and that there is something to train."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"model {run.model!r}: its state_dict has {name!r}, which is {type(value).__name__} and no"
                " tensor: leave it out (get_extra_state), or make it a buffer"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise UsageError(f"model {run.model!r}: tensor {name!r} is not an ordinary dense tensor")
        if dtype_name(value.dtype) is None:
            raise UsageError(
                f"model {run.model!r}: tensor {name!r} has the dtype {value.dtype}, which"
                " safetensors files cannot hold"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"model {run.model!r} has no parameter that could be trained")


def _check_training(model: nn.Module, run: RunConfig, task: Task) -> None:
    """Take a step of each training of the run."""
    schema = _schema(model)
    examples = Examples(_known_inputs(task.spec.inputs), _known_targets(task.spec.targets))
    for config in (run.pretrain, run.fine_tune):
        step = TrainingConfig.model_validate(
            config.model_dump(include=set(TrainingConfig.model_fields)) | {"epochs": 1, "augment": ()}
        )
        recipe = Recipe(step, task, seed=0, precision="float32")
        # With real examples and trained weights, a loss that is not finite now may be finite.
        with errors_of_model(run, UsageError), suppress(DivergedError):
            train(model, examples, recipe, device=torch.device("cpu"), ranks=ALONE)
    if _schema(model) != schema:
        raise UsageError(f"model {run.model!r}: names or shapes in its state_dict change while it trains")


def _schema(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _outputs(model: nn.Module, task: Task) -> Tensor:
    """Return the outputs in evaluation mode, float32 [N, …]."""
    inputs = _known_inputs(task.spec.inputs)
    if inputs.dtype == torch.uint8:
        # Whatever mean and deviation the run has.
        inputs = inputs.float() / 64 - 2
    else:
        inputs = DeviceData(inputs, task.spec, torch.device("cpu")).normalise(inputs)
    outputs: Tensor = task.outputs(model.eval()(inputs))
    return outputs.float()


def _known_inputs(inputs: Inputs) -> Tensor:
    """Return inputs, [N, …] as they are kept, that are the same everywhere."""
    shape = (NUM_EXAMPLES, *inputs.shape)
    values = _known_values("images", math.prod(shape)).view(shape)
    if inputs.dtype == "uint8":
        return ((values + 1) * 127.5).to(torch.uint8)
    if inputs.dtype == "int64":
        return _known_integers(shape, inputs.low, inputs.high)
    return _scaled(values, inputs.mean, inputs.std, inputs.low, inputs.high)


def _known_targets(targets: Targets) -> Tensor:
    """Return targets, [N, …] as they are kept, that are the same everywhere."""
    shape = (NUM_EXAMPLES, *targets.shape)
    if targets.dtype == "int64":
        return _known_integers(shape, targets.low, targets.high)
    values = _known_values("targets", math.prod(shape)).view(shape)
    return _scaled(values, targets.mean, targets.std, targets.low, targets.high)


def _known_integers(shape: Sequence[int], low: float | None, high: float | None) -> Tensor:
    """Return integers that go round and round from `low` to `high`, from 0 to 1 where both are open."""
    first = int(low) if low is not None else min(0, int(high or 0))
    last = int(high) if high is not None else max(first, 1)
    return (torch.arange(math.prod(shape)) % (last - first + 1) + first).view(*shape)


def _scaled(
    values: Tensor, mean: Sequence[float], std: Sequence[float], low: float | None, high: float | None
) -> Tensor:
    """Return values of this mean and deviation for each index of the first axis, within the bounds."""
    if mean:
        along_first = (-1, *(1 for _ in values.shape[2:]))
        values = values * torch.tensor(std).view(along_first) + torch.tensor(mean).view(along_first)
    return values.clamp(-math.inf if low is None else low, math.inf if high is None else high)


@torch.no_grad()
def _fill(state_dict: StateDict) -> None:
    """Give every floating-point tensor values that are the same everywhere, of a size that suits its place.

    Weights have the variance that keeps activations in bounds (He et al., arXiv 1502.01852, eq. 10). Integers
    and bools stay as they are: they may be indices.
    """
    for name, tensor in state_dict.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = _known_values(name, parts.numel()).view(parts.shape)
        if tensor.dim() > 1:
            values = values * math.sqrt(6 / max(1, math.prod(tensor.shape[1:])))
        elif name.endswith("running_var"):
            values = 1 + values / 2
        elif name.endswith("weight"):
            values = 1 + values / 10
        else:
            values = values / 10
        parts.copy_(values)


def _known_values(name: str, number: int) -> Tensor:
    """Return float32 [number], from -1 to 1, that follow from the name.

    NumPy promises that the bits of PCG64 are the same in every version (NEP 19), and so are these values.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    bits = np.random.PCG64(seed).random_raw(number)
    return torch.from_numpy(((bits >> 40).astype(np.float32) * 2.0**-23) - 1)
