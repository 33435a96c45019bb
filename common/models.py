"""Construction of a run's model from its name, with a check that the model fits the run's dataset.

The functions that need torchvision import it themselves. The import takes as long as the import of
PyTorch, and the model "mlp" does not need torchvision.
"""

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecavg.common.config import RunConfig
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import ECAvgError, UsageError
from ecavg.common.factories import first_line, import_factory
from ecavg.common.parts import shared_names
from ecavg.common.seeds import derive_seed
from ecavg.common.tasks.task import Task, output_shape_of, task_of
from ecavg.common.windows import Gru, cnn1d, head

_NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}
_OPTIONS: dict[str, dict[str, Any]] = {"googlenet": _NO_AUXILIARY_HEADS, "inception_v3": _NO_AUXILIARY_HEADS}

# The models of these families start with layers that halve the image one after the other, never in two
# parallel branches. `_widen` relies on this order.
_WIDENABLE = (
    "densenet", "efficientnet", "googlenet", "mnasnet", "mobilenet",
    "resnet", "resnext", "shufflenet", "squeezenet", "wide_resnet",
)  # fmt: skip


def model_names(*, of_masks: bool = False) -> list[str]:
    """Return the model names that `build_model` accepts besides `package.module:factory`.

    Args:
        of_masks: whether a model's output is a picture itself.
    """
    import torchvision

    module = torchvision.models.segmentation if of_masks else torchvision.models
    return [*_BUILT_IN, *torchvision.models.list_models(module=module)]


def build_model(
    run: RunConfig, *, seed: int | None = None, allowed_factories: Collection[str] | None = None
) -> nn.Module:
    """Build the run's model on the CPU.

    Everything that is drawn at random follows from the run's seed, wherever the model is built: a model may
    have random buffers that its state_dict leaves out. The function leaves the global random states of
    PyTorch, NumPy and Python unchanged.

    Args:
        run: the configuration that names the model and the dataset.
        seed: a seed under which the parameters, and they alone, are drawn anew; the same seed gives the same
            parameters, bit by bit. None leaves the parameters as they are drawn under the run's seed.
        allowed_factories: the user's own factories that may be imported; None allows any factory.

    Raises:
        UsageError: the model is unknown or not allowed, or does not fit the dataset.
    """
    make = _builder(run, allowed_factories)
    task = task_of(run, allowed_factories)
    model = _built(make, run, task, derive_seed(run.seed, "initial_weights"))
    if seed is not None:
        drawn = dict(_built(make, run, task, seed).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(drawn[name])
    return model


def _built(make: Callable[[RunConfig], nn.Module], run: RunConfig, task: Task, seed: int) -> nn.Module:
    with _seeded(seed):
        model = make(run)
        check_model(model, run, task)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of PyTorch, NumPy and Python, and put them back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _builder(run: RunConfig, allowed_factories: Collection[str] | None) -> Callable[[RunConfig], nn.Module]:
    """Return the function that makes the run's model, with its module imported.

    `build_model` calls this function before setting the seed, because an import may draw random numbers.
    """
    if run.model in _BUILT_IN:
        return _BUILT_IN[run.model]
    if ":" in run.model:
        factory = import_factory(run.model, allowed_factories)
        return lambda run: _call_factory(factory, run)
    if run.model not in model_names(of_masks=_makes_masks(run)):
        raise UsageError(
            f"unknown model {run.model!r}: choose {', '.join(_BUILT_IN)}, a model of torchvision.models"
            " such as resnet50, or your own package.module:factory"
        )
    return _torchvision_model


def shared_part(model: nn.Module, run: RunConfig) -> frozenset[str]:
    """Return the names of the tensors in the model's state_dict that travel; see common/parts.py.

    A tensor that has several names travels under all of them.

    Raises:
        UsageError: a pattern of the run matches no tensor.
    """
    tensors = model.state_dict(keep_vars=True)
    trainable = [name for name, tensor in tensors.items() if tensor.requires_grad]
    shared = {id(tensors[name]) for name in shared_names(run, tensors.keys(), trainable)}
    return frozenset(name for name, tensor in tensors.items() if id(tensor) in shared)


def check_model(model: nn.Module, run: RunConfig, task: Task) -> None:
    """Check that the model maps two of the dataset's inputs to the outputs of the task.

    Raises:
        UsageError: the model does not; the message names the found and the expected shape.
    """
    dataset = _described(run)
    was_training = model.training
    try:
        # Lazy modules create their parameters in this call. In inference_mode the parameters would be
        # inference tensors, which cannot be trained.
        with torch.no_grad():
            outputs = task.outputs(model.eval()(empty_inputs(run.spec)))
    # A model may raise any error for an input of a size that the model was not made for.
    except Exception as error:
        raise UsageError(f"model {run.model!r} cannot take {dataset}: {first_line(error)}") from error
    finally:
        model.train(was_training)
    found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    expected = output_shape_of(run)
    if found[:1] != [2] if expected is None else found != [2, *expected]:
        wanted = "a tensor [2, …]" if expected is None else [2, *expected]
        raise UsageError(
            f"model {run.model!r} does not fit {dataset}: for 2 {_noun(run)} its output is {found},"
            f" it should be {wanted}"
        )
    if not outputs.is_floating_point():
        raise UsageError(f"model {run.model!r} gives outputs of {outputs.dtype}, not of real numbers")


def empty_inputs(spec: DatasetSpec) -> Tensor:
    """Return two inputs as a model gets them, all zeros."""
    dtype = torch.int64 if spec.inputs.dtype == "int64" else torch.float32
    return torch.zeros(2, *spec.inputs.shape, dtype=dtype)


def _described(run: RunConfig) -> str:
    """Return the dataset in words, for a message."""
    num_classes, shape = run.spec.num_classes, list(run.spec.inputs.shape)
    classes = f"{num_classes} classes" if num_classes else f"targets of {list(run.spec.targets.shape)}"
    return f"dataset {run.dataset!r} with {classes} and {_noun(run)} of {shape}"


def _noun(run: RunConfig) -> str:
    return "images" if run.spec.is_pictures else "inputs"


@contextmanager
def errors_of_model(run: RunConfig, kind: type[ECAvgError]) -> Iterator[None]:
    """Turn whatever the code of a model raises while it computes into one line that names the model.

    Errors of the project itself, and of the disk, pass as they are.

    Raises:
        ECAvgError: of the kind asked for.
    """
    try:
        yield
    except (ECAvgError, OSError):
        raise
    except Exception as error:
        raise kind(f"model {run.model!r} failed: {type(error).__name__}: {first_line(error)}") from error


def _mlp(run: RunConfig) -> nn.Module:
    _refuse_small_images(run)
    shape = _known_output_shape(run)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(run.spec.inputs.shape), run.hidden_units),
        nn.ReLU(),
        *head(run.hidden_units, shape),
    )


def _cnn1d(run: RunConfig) -> nn.Module:
    return cnn1d(_channels_of_windows(run), run.hidden_units, _known_output_shape(run))


def _gru(run: RunConfig) -> nn.Module:
    return Gru(_channels_of_windows(run), run.hidden_units, _known_output_shape(run))


def _channels_of_windows(run: RunConfig) -> int:
    """Return the number of channels; raise UsageError if the inputs are no windows of a series."""
    _refuse_small_images(run)
    shape = run.spec.inputs.shape
    if len(shape) != 2:
        raise UsageError(
            f"model {run.model!r} takes windows [channels, steps], and the run's inputs are {list(shape)}"
        )
    return shape[0]


_BUILT_IN: Mapping[str, Callable[[RunConfig], nn.Module]] = {"mlp": _mlp, "cnn1d": _cnn1d, "gru": _gru}


def _known_output_shape(run: RunConfig) -> tuple[int, ...]:
    """Return the shape of the output for one example; raise UsageError if an own task alone knows it."""
    shape = output_shape_of(run)
    if shape is None:
        raise UsageError(f"model {run.model!r} is not defined for the task {run.task!r}: bring a model, too")
    return shape


def _call_factory(factory: Callable[..., Any], run: RunConfig) -> nn.Module:
    _refuse_small_images(run)
    try:
        model = factory(**_shapes_of(run))
    # The factory is the user's code, which may raise any error.
    except Exception as error:
        raise UsageError(f"the factory {run.model!r} failed: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"the factory {run.model!r} returned no torch.nn.Module")
    return model


def _shapes_of(run: RunConfig) -> dict[str, Any]:
    """Return what a user's factory is called with."""
    if run.task == "classification" and run.spec.is_pictures:
        return {"num_classes": run.spec.num_classes, "image_shape": run.spec.inputs.shape}
    return {"input_shape": run.spec.inputs.shape, "output_shape": output_shape_of(run)}


def _makes_masks(run: RunConfig) -> bool:
    """Return True if a model's output for one example has a height and a width."""
    return len(output_shape_of(run) or ()) == 3


def _torchvision_model(run: RunConfig) -> nn.Module:
    import torchvision

    if not run.model.startswith(_WIDENABLE):
        _refuse_small_images(run)
    # Regressions have no classes, but an output for each number.
    num_outputs = _known_output_shape(run)[0]
    options = _OPTIONS.get(run.model, {})
    if _makes_masks(run):
        options = {"weights_backbone": None}
    model: nn.Module = torchvision.models.get_model(
        run.model, weights=None, num_classes=num_outputs, **options
    )
    if run.small_images:
        _widen(model)
    return model


def _refuse_small_images(run: RunConfig) -> None:
    """Raise UsageError if the run sets `small_images`, which only some torchvision models support."""
    if run.small_images:
        raise UsageError(f"small_images is not defined for model {run.model!r}: leave it out")


def _widen(model: nn.Module) -> None:
    """Remove the first two layers that halve the image.

    These layers are meant for images of 224x224 pixels, and would leave hardly a pixel of a 32x32 image.
    For ResNets the result is the stem of He et al. (arXiv 1512.03385, section 4.2): a 3x3 convolution with
    stride 1, and no pooling.
    """
    for name, layer in [item for item in model.named_modules() if _halves(item[1])][:2]:
        if not isinstance(layer, nn.Conv2d):
            model.set_submodule(name, nn.Identity())
        elif layer.kernel_size == (7, 7):
            model.set_submodule(name, _narrow(layer))
        else:
            layer.stride = (1, 1)


def _halves(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer.stride in (2, (2, 2))


def _narrow(wide: nn.Conv2d) -> nn.Conv2d:
    """Return a 3x3 convolution with stride 1 that replaces the 7x7 convolution `wide`."""
    bias = wide.bias is not None
    conv = nn.Conv2d(wide.in_channels, wide.out_channels, kernel_size=3, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
