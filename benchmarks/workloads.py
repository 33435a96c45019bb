"""Models and data that the product's own processes load in a benchmark, by `package.module:factory`."""

# The product calls factories with arguments of these names, also where a factory does not need them.
# ruff: noqa: ARG001

import random

import numpy as np
import torch
from torch import Tensor, nn

NUM_IMAGES = 4
MIB_FLOATS = 2**18

_chance = random.SystemRandom()


def resnet50(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build torchvision's ResNet-50, which has 25.6 million parameters with 1000 classes."""
    return _torchvision("resnet50", num_classes)


def mobilenet_v2(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build torchvision's MobileNetV2, which has 3.5 million parameters with 1000 classes."""
    return _torchvision("mobilenet_v2", num_classes)


def tiny(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a model of one layer, which has 110 parameters for 10 classes and 10 pixels."""
    channels, height, width = image_shape
    return _changing(nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes)))


def blocks(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a model that only has a size: one tensor of 1 MiB for each pixel of the image's width."""
    return Blocks(num_classes, image_shape[2])


def colour_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    return _images(3, 32, 32)


def tiny_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    return _images(1, 2, 5)


class Blocks(nn.Module):
    def __init__(self, num_classes: int, num_blocks: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.blocks = nn.ParameterList(torch.randn(MIB_FLOATS) for _ in range(num_blocks))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # One value is used, because a model of which nothing can be trained is refused.
        logits: Tensor = x_BCHW.new_zeros(len(x_BCHW), self.num_classes) + self.blocks[0][0]
        return logits


def _torchvision(name: str, num_classes: int) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return _changing(model)


def _changing(model: nn.Module) -> nn.Module:
    """Add to the model one number that changes whenever the model is used, and return the model.

    Without training, the weights would be the same in every round, and agents do not send known weights
    again. The added number makes new weights at no cost.
    """
    model.register_buffer("salt", torch.zeros(1))
    model.register_forward_pre_hook(_salt)
    return model


def _salt(model: nn.Module, _: object) -> None:
    with torch.no_grad():
        model.get_buffer("salt").fill_(_chance.random())


def _images(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_IMAGES, *shape), np.uint8)
    return images, np.arange(NUM_IMAGES)
