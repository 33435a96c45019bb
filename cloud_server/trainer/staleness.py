"""Stale contributions, whose pre-training started from an older global model than the round did.

A stale contribution counts by what its agent has changed: in place of the agent's weights, the round takes
`current + (weights - start)`, and the coefficient in a mean is divided by √(1 + staleness) (FedBuff, arXiv
2106.06639, section 5). FedBuff divides the sum of the updates by their number, so that a buffer of stale
updates alone makes a smaller step. Here the mean is one of weights, divided by the sum of the coefficients:
what an update counts depends on the others of its round.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from ecavg.cloud_server.trainer.pieces import PIECE_ELEMENTS, Contributions, write_piece
from ecavg.common.tensor_files import PLAIN, writing
from ecavg.common.wire import is_statistic


def discount(staleness: int) -> float:
    """Return the factor for the coefficient of a contribution that is so many global models old."""
    return 1 / math.sqrt(1 + staleness)


def shift(weights: Path, start: Path, current: Path, target: Path) -> None:
    """Write the weights that the agent's changes make of the current ones: `current + (weights - start)`.

    The sum is computed in float64 and rounded to the dtype of the tensor; what is beyond the dtype becomes
    its largest value. Integers and running statistics are taken from the agent: a statistic is measured and
    not trained, and a variance to which a difference is added may fall below zero. The memory does not depend
    on the size of the files.

    Args:
        weights: the file of the weights that the agent has sent, decoded.
        start: the file of the weights that the agent's pre-training started from.
        current: the file of the round's initial weights.
        target: the file to write, which may be the first of these.

    Raises:
        RunError: the files differ in names, shapes or dtypes, or a file contradicts its header.
        OSError: a file cannot be read or written.
    """
    files = Contributions([weights, start, current])
    with writing(target, files.stored, PLAIN) as shifted:
        for name in files.schema:
            for begin, piece in files.pieces(name, PIECE_ELEMENTS):
                own, before, now = (values.clone() for values in piece)
                is_trained = own.is_floating_point() and not is_statistic(name)
                values = _moved(own, before, now).to(own.dtype) if is_trained else own
                write_piece(shifted, name, begin, values)


def _moved(own: Tensor, start: Tensor, current: Tensor) -> Tensor:
    """Return `current + (own - start)` in float64, within the range of the tensors' dtype."""
    limits = torch.finfo(own.dtype)
    moved = current.double() + (own.double() - start.double())
    return moved.clamp(limits.min, limits.max)
