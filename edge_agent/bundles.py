"""The named datasets that come with scikit-learn, and so are on every device."""

from collections.abc import Callable, Mapping

import numpy as np

from edge_agent.arrays import Arrays


def open_bundle(name: str) -> Arrays:
    """Return all examples of the dataset, which is one of BUNDLES."""
    return BUNDLES[name]()


# Each function imports scikit-learn itself, which takes a second that other sources need not wait.


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    # The pixels are from 0 to 16.
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Arrays(images, labels.astype(np.int64))


def _diabetes() -> Arrays:
    from sklearn.datasets import load_diabetes

    columns, progression = load_diabetes(return_X_y=True, scaled=False)
    return Arrays(columns.astype(np.float32), progression.astype(np.float32)[:, None])


def _breast_cancer() -> Arrays:
    from sklearn.datasets import load_breast_cancer

    columns, labels = load_breast_cancer(return_X_y=True)
    return Arrays(columns.astype(np.float32), labels.astype(np.int64))


def _wine() -> Arrays:
    from sklearn.datasets import load_wine

    columns, labels = load_wine(return_X_y=True)
    return Arrays(columns.astype(np.float32), labels.astype(np.int64))


BUNDLES: Mapping[str, Callable[[], Arrays]] = {
    "digits": _digits,
    "diabetes": _diabetes,
    "breast-cancer": _breast_cancer,
    "wine": _wine,
}
