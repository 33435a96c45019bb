"""From a model's name to the model, checked against the run's dataset.

torchvision is imported where it is needed: that takes as long as importing PyTorch itself, and an mlp
does without it.
"""

import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from common.config import RunConfig
from common.errors import UsageError

_NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}
_OPTIONS: dict[str, dict[str, Any]] = {"googlenet": _NO_AUXILIARY_HEADS, "inception_v3": _NO_AUXILIARY_HEADS}

# Families that halve the image one layer after the other, never in two branches at once, at their start.
_WIDENABLE = (
    "densenet", "efficientnet", "googlenet", "mnasnet", "mobilenet",
    "resnet", "resnext", "shufflenet", "squeezenet", "wide_resnet",
)  # fmt: skip


def model_names() -> list[str]:
    """The names that `build_model` knows by itself."""
    import torchvision

    return ["mlp", *torchvision.models.list_models(module=torchvision.models)]


def build_model(run: RunConfig, *, seed: int, allowed_factories: Collection[str] | None = None) -> nn.Module:
    """Build the run's model on the CPU with float32 weights drawn under `seed`.

    The global random state is left as it was.

    Args:
        run: names the model, and the dataset that it must fit.
        seed: the same seed gives the same weights, bit by bit.
        allowed_factories: the user's own factories that may be imported; None: any.

    Raises:
        UsageError: unknown or forbidden model, or one that does not fit the dataset.
    """
    make = _builder(run, allowed_factories)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make(run)
        check_model(model, run)
    return model


def _builder(run: RunConfig, allowed_factories: Collection[str] | None) -> Callable[[RunConfig], nn.Module]:
    """What makes the run's model; imported before the seed is set, for an import may draw numbers, too."""
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


def check_model(model: nn.Module, run: RunConfig) -> None:
    """Check that the model maps the dataset's images to one output for each of its classes.

    Raises:
        UsageError: naming the model, what it gives, and what the dataset wants.
    """
    num_classes, image_shape = run.spec.num_classes, run.spec.image_shape
    dataset = f"dataset {run.dataset!r} with {num_classes} classes and images of {list(image_shape)}"
    was_training = model.training
    try:
        with torch.no_grad():  # not inference_mode: lazy modules make their parameters here
            outputs = model.eval()(torch.zeros(2, *image_shape))
    except Exception as error:  # a model may raise anything at an image that it was not made for
        raise UsageError(f"model {run.model!r} cannot take {dataset}: {_first_line(error)}") from error
    finally:
        model.train(was_training)
    found = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if found != [2, num_classes]:
        raise UsageError(
            f"model {run.model!r} does not fit {dataset}: for 2 images its output is {found},"
            f" it should be {[2, num_classes]}"
        )


def import_factory(name: str, allowed_factories: Collection[str] | None) -> Callable[..., Any]:
    """Import the user's own `package.module:factory`; None allows any name.

    Raises:
        UsageError: not allowed here, or it cannot be imported.
    """
    if allowed_factories is not None and name not in allowed_factories:
        raise UsageError(
            f"this device does not allow the factory {name!r}:"
            f" if you trust its code, start the agent with --allow-factory {name}"
        )
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UsageError(
            f"cannot import the factory {name!r} (is its folder on PYTHONPATH?): {_first_line(error)}"
        ) from error
    if not callable(factory):
        raise UsageError(f"the factory {name!r} is not a function")
    return factory  # type: ignore[no-any-return]


def _mlp(run: RunConfig) -> nn.Module:
    channels, height, width = run.spec.image_shape
    _no_small_images(run)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, run.hidden_units),
        nn.ReLU(),
        nn.Linear(run.hidden_units, run.spec.num_classes),
    )


def _call_factory(factory: Callable[..., Any], run: RunConfig) -> nn.Module:
    _no_small_images(run)
    try:
        model = factory(num_classes=run.spec.num_classes, image_shape=run.spec.image_shape)
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"the factory {run.model!r} failed: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"the factory {run.model!r} returned no torch.nn.Module")
    return model


def _torchvision_model(run: RunConfig) -> nn.Module:
    import torchvision

    if not run.model.startswith(_WIDENABLE):
        _no_small_images(run)
    model: nn.Module = torchvision.models.get_model(
        run.model, weights=None, num_classes=run.spec.num_classes, **_OPTIONS.get(run.model, {})
    )
    if run.small_images:
        _widen(model)
    return model


def _no_small_images(run: RunConfig) -> None:
    if run.small_images:
        raise UsageError(f"small_images is not defined for model {run.model!r}: leave it out")


def _widen(model: nn.Module) -> None:
    """Take out the first two halvings, meant for 224x224 images: they leave a 32x32 one hardly a pixel.

    For ResNets this is the stem of He et al. (arXiv 1512.03385, section 4.2): 3x3, stride 1, no pooling.
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
    """A 3x3 convolution with stride 1 in place of the 7x7 one."""
    bias = wide.bias is not None
    conv = nn.Conv2d(wide.in_channels, wide.out_channels, kernel_size=3, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
