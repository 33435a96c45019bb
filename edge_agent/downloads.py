"""The named datasets of torchvision: on this device already, or downloaded to it.

torchvision is imported where it is needed, because it takes as long as PyTorch.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError
from edge_agent.config import data_root
from edge_agent.splits import ArraySplit, Source

# The class of each dataset in torchvision.datasets.
TORCHVISION: Mapping[str, str] = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def open_dataset(name: str, data_dir: Path | None) -> Source:
    """Return the dataset, which is downloaded if need be.

    Raises:
        UsageError: its files cannot be read, or not be downloaded.
    """
    root = data_root(data_dir)
    if data_dir is not None and not root.is_dir():
        raise UsageError(f"data folder {root} does not exist: make it, or name the right one with --data-dir")
    try:
        return _read_dataset(name, root)
    # torchvision raises whatever a broken file or network led it to.
    except Exception as error:
        raise _unreadable(name, root, error) from error


def find_dataset(name: str, data_dir: Path | None) -> Source | None:
    """Return the dataset if it is on this device; None: it is downloaded at the agent's start.

    Raises:
        UsageError: its files cannot be read.
    """
    root = data_root(data_dir)
    try:
        return _read_torchvision(name, root, download=False)
    except RuntimeError:
        # So torchvision says that the dataset is not there.
        return None
    except Exception as error:
        raise _unreadable(name, root, error) from error


def _unreadable(name: str, root: Path, error: Exception) -> UsageError:
    """Return the error for a dataset that cannot be read or downloaded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(
        f"cannot load {name} from {root}: {reason}; give a folder that has it with --data-dir,"
        " or one to download it to"
    )


def _read_torchvision(name: str, root: Path, *, download: bool) -> Source:
    from torchvision import datasets

    dataset = getattr(datasets, TORCHVISION[name])
    parts = (dataset(root, train=train, download=download) for train in (True, False))
    return Source(*(_to_split(part) for part in parts))


def _read_dataset(name: str, root: Path) -> Source:
    try:
        return _read_torchvision(name, root, download=False)
    except RuntimeError:
        # So torchvision says that the dataset is not there.
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("it is not there, and the folder is not writable") from None
    with _locked(root / ".download.lock"):
        # Several agents on one machine may start together.
        return _read_torchvision(name, root, download=True)


def _to_split(dataset: Any) -> ArraySplit:
    # The shape is [N, H, W] or [N, H, W, C].
    images = np.asarray(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return ArraySplit(images, np.asarray(dataset.targets, np.int64))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
