"""Construction of a run's model from its name, with a check that the model fits the run's dataset.

The functions that need torchvision import it themselves. The import takes as long as the import of
PyTorch, and the model "mlp" does not need torchvision.
"""

import importlib
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import RunConfig
from common.errors import ECAvgError, UsageError
from common.evaluation import main_output
from common.parts import shared_names
from common.seeds import derive_seed

_NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}
_OPTIONS: dict[str, dict[str, Any]] = {"googlenet": _NO_AUXILIARY_HEADS, "inception_v3": _NO_AUXILIARY_HEADS}

# The models of these families start with layers that halve the image one after the other, never in two
# parallel branches. `_widen` relies on this order.
_WIDENABLE = (
    "densenet", "efficientnet", "googlenet", "mnasnet", "mobilenet",
    "resnet", "resnext", "shufflenet", "squeezenet", "wide_resnet",
)  # fmt: skip


def model_names() -> list[str]:
    """Return the model names that `build_model` accepts besides `package.module:factory`."""
    import torchvision

    return ["mlp", *torchvision.models.list_models(module=torchvision.models)]


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
    model = _built(make, run, derive_seed(run.seed, "initial_weights"))
    if seed is not None:
        drawn = dict(_built(make, run, seed).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(drawn[name])
    return model


def _built(make: Callable[[RunConfig], nn.Module], run: RunConfig, seed: int) -> nn.Module:
    with _seeded(seed):
        model = make(run)
        check_model(model, run)
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
    if run.model == "mlp":
        return _mlp
    if ":" in run.model:
        factory = import_factory(run.model, allowed_factories)
        return lambda run: _call_factory(factory, run)
    if run.model not in model_names():
        raise UsageError(
            f"unknown model {run.model!r}: choose mlp, a classification model of torchvision.models"
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


def check_model(model: nn.Module, run: RunConfig) -> None:
    """Check that the model maps images [2, C, H, W] of the dataset to outputs [2, num_classes].

    Raises:
        UsageError: the model does not; the message names the found and the expected shape.
    """
    num_classes, image_shape = run.spec.num_classes, run.spec.image_shape
    dataset = f"dataset {run.dataset!r} with {num_classes} classes and images of {list(image_shape)}"
    was_training = model.training
    try:
        # Lazy modules create their parameters in this call. In inference_mode the parameters would be
        # inference tensors, which cannot be trained.
        with torch.no_grad():
            outputs = main_output(model.eval()(torch.zeros(2, *image_shape)))
    # A model may raise any error for an image of a size that the model was not made for.
    except Exception as error:
        raise UsageError(f"model {run.model!r} cannot take {dataset}: {_first_line(error)}") from error
    finally:
        model.train(was_training)
    found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != [2, num_classes]:
        raise UsageError(
            f"model {run.model!r} does not fit {dataset}: for 2 images its output is {found},"
            f" it should be {[2, num_classes]}"
        )
    if not outputs.is_floating_point():
        raise UsageError(f"model {run.model!r} gives outputs of {outputs.dtype}, not of real numbers")


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
        raise kind(f"model {run.model!r} failed: {type(error).__name__}: {_first_line(error)}") from error


def import_factory(name: str, allowed_factories: Collection[str] | None) -> Callable[..., Any]:
    """Import and return the user's own factory.

    Args:
        name: the factory as `package.module:factory`.
        allowed_factories: the names that may be imported; None allows any name.

    Raises:
        UsageError: the name is not allowed here, or cannot be imported, or is not callable.
    """
    if allowed_factories is not None and name not in allowed_factories:
        raise UsageError(
            f"this device does not allow the factory {name!r}:"
            f" if you trust its code, start the agent with --allow-factory {name}"
        )
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    # The import runs the user's code, which may raise any error.
    except Exception as error:
        raise UsageError(
            f"cannot import the factory {name!r} (is its folder on PYTHONPATH?): {_first_line(error)}"
        ) from error
    if not callable(factory):
        raise UsageError(f"the factory {name!r} is not a function")
    return factory  # type: ignore[no-any-return]


def _mlp(run: RunConfig) -> nn.Module:
    channels, height, width = run.spec.image_shape
    _refuse_small_images(run)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, run.hidden_units),
        nn.ReLU(),
        nn.Linear(run.hidden_units, run.spec.num_classes),
    )


def _call_factory(factory: Callable[..., Any], run: RunConfig) -> nn.Module:
    _refuse_small_images(run)
    try:
        model = factory(num_classes=run.spec.num_classes, image_shape=run.spec.image_shape)
    # The factory is the user's code, which may raise any error.
    except Exception as error:
        raise UsageError(f"the factory {run.model!r} failed: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"the factory {run.model!r} returned no torch.nn.Module")
    return model


def _torchvision_model(run: RunConfig) -> nn.Module:
    import torchvision

    if not run.model.startswith(_WIDENABLE):
        _refuse_small_images(run)
    model: nn.Module = torchvision.models.get_model(
        run.model, weights=None, num_classes=run.spec.num_classes, **_OPTIONS.get(run.model, {})
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
