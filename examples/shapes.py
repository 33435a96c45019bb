"""A data source and a model of a user's own."""

import numpy as np
from torch import nn


def images(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the images, uint8 [N, C, H, W], and the labels, integers [N], of "train" or "test".

    None says that there is no such split: a part of the training images is then held out.
    """
    if split == "test":
        return None
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    pixels = rng.integers(0, 100, (120, 1, 12, 12), dtype=np.uint8)
    pixels += (labels * 60).astype(np.uint8)[:, None, None, None]
    return pixels, labels


def net(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return a network that maps images [B, C, H, W] to one score for each class, [B, num_classes]."""
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))
