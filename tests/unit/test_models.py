import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.models import build_model, check_model, model_names
from ecavg.common.tasks.task import task_of

FACTORIES = """
import torch
from torch import nn

def good(*, num_classes, image_shape):
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))

def lazy(*, num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def no_module(*, num_classes, image_shape):
    return "model"

def broken(*, num_classes, image_shape):
    raise RuntimeError("first line\\nsecond line")

def too_wide(*, num_classes, image_shape):
    return good(num_classes=num_classes + 1, image_shape=image_shape)

class Pair(nn.Module):
    def forward(self, x):
        return {"image": x}, x

def pair(*, num_classes, image_shape):
    return Pair()

constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    return "their_models"


def cifar(model: str, **more: Any) -> RunConfig:
    return RunConfig(model=model, dataset="cifar10", **more)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_mlp_is_the_papers_network() -> None:
    model = build_model(RunConfig(dataset="mnist"), seed=0)
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert num_parameters(model) == 784 * 128 + 128 + 128 * 10 + 10


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (build_model(RunConfig(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_global_random_state_neither_matters_nor_changes() -> None:
    weights = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights.append(build_model(RunConfig(), seed=1).state_dict()["1.weight"])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*weights)


def test_model_comes_in_training_mode_with_its_statistics_untouched() -> None:
    model = build_model(cifar("mobilenet_v2"), seed=0)
    assert model.training
    assert model.features[0][1].num_batches_tracked == 0


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_torchvision_model_is_the_library_own_with_the_run_classes(name: str) -> None:
    model = build_model(cifar(name, num_classes=7, image_shape=(3, 40, 40)), seed=3)
    torch.manual_seed(3)
    expected = torchvision.models.get_model(name, num_classes=7).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1"])
def test_models_with_odd_arguments_are_built_without_a_warning(name: str) -> None:
    assert build_model(cifar(name, image_shape=(3, 64, 64)), seed=0).training


def test_small_images_give_resnet_the_stem_for_32x32() -> None:
    model = build_model(cifar("resnet50", small_images=True), seed=0)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    # The usual ResNet50 for CIFAR-10 (23,520,842 parameters), as in kuangliu/pytorch-cifar.
    assert num_parameters(model) == 23_520_842


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "shufflenet_v2_x0_5"])
def test_small_images_keep_four_times_the_resolution(name: str) -> None:
    sizes = []
    for small_images in (False, True):
        model = build_model(cifar(name, small_images=small_images), seed=0).eval()
        shapes: list[torch.Size] = []
        last = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)][-1]
        last.register_forward_hook(lambda _m, _i, output, shapes=shapes: shapes.append(output.shape))
        model(torch.zeros(1, 3, 64, 64))
        sizes.append(shapes[0][2])
    assert sizes[1] == 4 * sizes[0]


@pytest.mark.parametrize("name", ["mlp", "vgg11", "vit_b_16"])
def test_small_images_are_refused_where_not_defined(name: str) -> None:
    with pytest.raises(UsageError, match=f"small_images is not defined for model '{name}'"):
        build_model(cifar(name, small_images=True), seed=0)


def test_names_are_classifiers_only() -> None:
    names = model_names()
    assert {"mlp", "resnet50", "mobilenet_v2", "vit_b_16", "densenet121"} <= set(names)
    assert not any("fcn" in name or "rcnn" in name or "quantized" in name or "r3d" in name for name in names)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (cifar("resnet5000"), "unknown model 'resnet5000': choose mlp,"),
        (cifar("fcn_resnet50"), "unknown model"),
        (RunConfig(model="resnet18", dataset="mnist"), "expected input.* to have 3 channels, but got 1"),
        (cifar("alexnet"), r"cannot take dataset 'cifar10' with 10 classes and images of \[3, 32, 32\]"),
        (RunConfig(model="squeezenet1_1", dataset="cifar10", image_shape=(3, 8, 8)), "cannot take dataset"),
    ],
)
def test_model_that_cannot_be_used_is_refused_in_one_line(run: RunConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_model(run, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["good", "lazy"])
def test_factory_of_the_user_builds_the_model(factories: str, factory: str) -> None:
    run = cifar(f"{factories}:{factory}")
    first, again = (build_model(run, seed=4, allowed_factories={run.model}) for _ in range(2))
    assert first[1].weight.shape == (10, 3072)
    assert torch.equal(first[1].weight, again[1].weight)
    first(torch.zeros(1, 3, 32, 32)).sum().backward()  # the parameters can be trained


def test_factory_that_the_agent_does_not_allow_is_never_imported(factories: str) -> None:
    with pytest.raises(UsageError, match=f"--allow-factory {factories}:good"):
        build_model(cifar(f"{factories}:good"), seed=0, allowed_factories=["other:good"])
    assert factories not in sys.modules


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("their_models:no_module", "returned no torch.nn.Module"),
        ("their_models:broken", "failed: first line$"),
        ("their_models:missing", "cannot import .* has no attribute 'missing'"),
        ("their_models:constant", "is not a function"),
        ("no_such_package:factory", "PYTHONPATH.*No module named 'no_such_package'"),
        (":factory", "cannot import"),
        ("their_models:too_wide", r"output is \[2, 11\], it should be \[2, 10\]"),
        ("their_models:pair", r"output is dict, it should be \[2, 10\]"),
    ],
)
def test_factory_that_does_not_work_is_refused_in_one_line(
    factories: str, factory: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(cifar(factory), seed=0)


def test_check_leaves_the_mode_of_the_model_alone() -> None:
    run = RunConfig()
    model = build_model(run, seed=0).eval()
    check_model(model, run, task_of(run))
    assert not model.training
