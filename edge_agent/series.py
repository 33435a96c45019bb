"""Splits of examples that overlap, in the order of time: windows of a series.

A part is a block of examples one after the other, because a window and the next ones have rows in common.
Between two parts so many examples are left out that no row is in both.
"""

import numpy as np

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.edge_agent.partition import Partition
from ecavg.edge_agent.tables import TableFormat


def check_overlap(run: RunConfig, table: TableFormat) -> None:
    """Raise UsageError if the windows of a table overlap with more of their kind than the run says."""
    noun = "samples" if table.sample_rate else "rows"
    if table.overlap > run.spec.inputs.overlap:
        raise UsageError(
            f"windows of {table.window} {noun} share {noun} with the next {table.overlap} windows:"
            f" set overlap = {table.overlap} in the server's [run.inputs] table"
        )


def check_shared_fraction(run: RunConfig, fraction: float) -> None:
    """Raise UsageError if only some of the examples are shared though they overlap.

    The device would train on private windows whose rows the cloud measures on.
    """
    if run.spec.inputs.overlap and fraction not in (0, 1):
        raise UsageError("the run's examples overlap in time: set share_data to all or none")


def hold_out_latest(num_examples: int, fraction: float, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back about the last `fraction` of the examples, so that models are measured on what comes later.

    Where examples are added at the end, none that was trained on is held out afterwards.

    Args:
        overlap: how many of the next examples share rows with an example.

    Returns:
        int64 indices of the rest and of the held-out part; `overlap` examples between them are in neither.

    Raises:
        UsageError: nothing would be left to train on.
    """
    cut = num_examples - max(1, int(fraction * num_examples))
    if cut <= overlap:
        raise UsageError(
            f"{num_examples} windows are too few to hold some back: {overlap} of them lie between those to"
            " train on and the others"
        )
    return np.arange(cut - overlap), np.arange(cut, num_examples)


def block_of(num_examples: int, partition: Partition, overlap: int) -> np.ndarray:
    """Return int64 indices of a partition's block, without examples that overlap with the block before."""
    block = np.array_split(np.arange(num_examples), partition.count)[partition.index - 1]
    return block if partition.index == 1 else block[overlap:]
