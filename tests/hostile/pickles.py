"""Bombs: bytes that run code in whoever unpickles them, of every kind that machine learning knows.

The one module that unpickles: `UNPICKLE` is the control that a bomb would go off, in test_pickle.py.
"""

import io
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def plain(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def oldest_protocol(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker), protocol=0)


def of_torch(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"1.bias": torch.zeros(4), "x": Bomb(marker)}, file)
    return file.getvalue()


def of_old_torch(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"x": Bomb(marker)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def of_numpy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def of_joblib(marker: Path) -> bytes:
    file = io.BytesIO()
    joblib.dump({"x": Bomb(marker)}, file, compress=3)
    return file.getvalue()


def behind_a_length(marker: Path) -> bytes:
    """Where a safetensors file has its header."""
    content = plain(marker)
    return len(content).to_bytes(8, "little") + content


UNPICKLE: dict[Callable[[Path], bytes], Callable[[bytes], Any]] = {
    plain: pickle.loads,
    oldest_protocol: pickle.loads,
    of_torch: lambda content: torch.load(io.BytesIO(content), weights_only=False),
    of_old_torch: lambda content: torch.load(io.BytesIO(content), weights_only=False),
    of_numpy: lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    of_joblib: lambda content: pickle.loads(zlib.decompress(content)),
    behind_a_length: lambda content: pickle.loads(content[8:]),
}
