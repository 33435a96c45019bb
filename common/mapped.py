"""Rows of several shards that stay in their files until they are asked for.

A rank that trains together with others needs another part of the examples in each epoch. The files are mapped
into memory, so that a rank holds the rows of a few batches, and the ranks of a machine share what the system
keeps of the files.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class MappedRows:
    """The chosen rows of some arrays, one after the other, as if they were one tensor on the CPU.

    Args:
        parts: arrays [N, …] of one dtype and shape, such as views of mapped files, each with the int64
            indices of its chosen rows; at least one.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(indices) for _, indices in parts])
        self.shape = torch.Size((int(self._ends[-1]), *parts[0][0].shape[1:]))
        self.dtype = torch.from_numpy(np.empty(0, parts[0][0].dtype)).dtype
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return a copy of the rows, [B, …], which are given by a slice or by int64 numbers [B]."""
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        array = self._parts[0][0]
        found = np.empty((len(numbers), *array.shape[1:]), array.dtype)
        part_of_row = np.searchsorted(self._ends, numbers, side="right")
        for part in np.unique(part_of_row):
            array, indices = self._parts[part]
            here = part_of_row == part
            begin = self._ends[part] - len(indices)
            found[here] = array[indices[numbers[here] - begin]]
        return torch.from_numpy(found)


# Rows in memory, or in files.
Rows = Tensor | MappedRows


def in_memory(rows: Rows) -> Tensor:
    """Return the rows as a tensor, into which they are copied if they are in files."""
    return rows[:] if isinstance(rows, MappedRows) else rows
