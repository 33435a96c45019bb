"""Data sources of a user's own, for tests."""

import numpy as np
from sklearn.datasets import load_digits


def misread_digits(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a specialist's data: two classes, each with the other's label, unlike all other agents."""
    if split != "train":
        return None
    pixels, labels = load_digits(return_X_y=True, n_class=2)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images[:160], (1 - labels[:160]).astype(np.int64)


def flipped_digits(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a poisoner's data: zeros are labelled as nines, ones as eights, and so on."""
    if split != "train":
        return None
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images, (9 - labels).astype(np.int64)
