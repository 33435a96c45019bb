"""Pictures with masks: a set that is generated, and a small network that finds discs and squares in it.

    python examples/masks.py FOLDER SEED    writes 60 generated pictures with their masks

They are no photographs: grey noise, in which a disc and a square shine a little. The files are what
photographs with masks are: pictures in FOLDER/images, and in FOLDER/masks PNG files of the same names.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

COUNT = 60
SIZE = 24
NOTHING, DISC, SQUARE = range(3)
SHADES = np.array([90, 150, 200])
COLOURS = [0, 0, 0, 200, 60, 60, 60, 60, 200]


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a grey picture and the class of each pixel, both uint8 [H, W]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    classes = np.full((SIZE, SIZE), NOTHING, np.uint8)
    top, left, up, across = rng.integers(3, SIZE - 3, 4)
    classes[np.maximum(abs(y - top), abs(x - left)) <= rng.integers(3, 6)] = SQUARE
    classes[(y - up) ** 2 + (x - across) ** 2 <= rng.integers(9, 30)] = DISC
    pixels = SHADES[classes] + rng.normal(0, 25, classes.shape)
    return pixels.clip(0, 255).astype(np.uint8), classes


def write(folder: Path, seed: int) -> None:
    """Write the set; each seed gives another one."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(COUNT):
        pixels, classes = draw(rng)
        Image.fromarray(pixels).save(folder / f"images/{number:03}.png")
        mask = Image.fromarray(classes)
        # With a palette a mask looks like something, and its values are the classes all the same.
        mask.putpalette(COLOURS)
        mask.save(folder / f"masks/{number:03}.png")


def net(input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> nn.Module:
    """Return a network that maps pictures [B, C, H, W] to a score for each class and pixel, [B, K, H, W]."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, output_shape[0], 1),
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
