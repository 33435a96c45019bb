"""The named datasets that come with scikit-learn, which is on every device, or with an optional package."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ecavg.common.dataset import SUNSPOTS_WINDOW
from ecavg.common.errors import UsageError
from ecavg.edge_agent.arrays import Arrays
from ecavg.edge_agent.tables import TableFormat, open_table


def open_bundle(name: str) -> Arrays:
    """Return all examples of the dataset, which is one of BUNDLES.

    Raises:
        UsageError: the package that it comes with is not installed.
    """
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


def _sunspots() -> Arrays:
    # The package is not imported, because its file of yearly numbers from 1700 to 2008 is all that is needed.
    package = find_spec("statsmodels")
    if package is None or package.origin is None:
        raise UsageError("the dataset sunspots needs statsmodels: pip install 'ecavg[series]'")
    path = Path(package.origin).parent / "datasets" / "sunspots" / "sunspots.csv"
    activity = ("SUNACTIVITY",)
    windows, targets = open_table(path, TableFormat(activity, activity, SUNSPOTS_WINDOW))
    return Arrays(windows.astype(np.float32), targets.astype(np.float32)[:, None])


BUNDLES: Mapping[str, Callable[[], Arrays]] = {
    "digits": _digits,
    "diabetes": _diabetes,
    "breast-cancer": _breast_cancer,
    "wine": _wine,
    "sunspots": _sunspots,
}
