"""The norms of the agents' updates, and the clipping of updates whose norm is too large.

An update is the difference between the weights that an agent sends and the weights from which the round
started. The norm of an update is its Euclidean norm over all floating-point tensors except BatchNorm's
running statistics, which are in the units of activations. Clipping shortens an update without changing its
direction, which bounds the influence of one agent (Sun et al., Can You Really Backdoor Federated Learning?,
arXiv 1911.07963). The bound is a multiple of the round's median norm, because the length of a round's updates
is not known beforehand. A minority of agents cannot move the median out of the range of the others.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ecavg.cloud_server.trainer.pieces import PIECE_ELEMENTS, Contributions, torch_dtype, write_piece
from ecavg.common.tensor_files import PLAIN, writing
from ecavg.common.wire import is_statistic


def update_norms(paths: Sequence[Path], base: Path | None) -> list[float]:
    """Return the norm of each update in float64; infinity stands for a norm that is beyond float64.

    The memory that the function takes depends neither on the number of files nor on their size.

    Args:
        paths: safetensors files with equal names, shapes and dtypes.
        base: the file of the weights from which all agents started. If it is None, the agents have no common
            start, and the norms are those of the weights themselves.

    Raises:
        RunError: the files differ in names, shapes or dtypes, or a file contradicts its header.
        OSError: a file cannot be read.
    """
    files = Contributions([*([base] if base else []), *paths])
    norms = [0.0] * len(paths)
    for name, spec in files.schema.items():
        if is_statistic(name) or not torch_dtype(spec).is_floating_point:
            continue
        for _, piece in files.pieces(name, PIECE_ELEMENTS):
            values = (each.double() for each in piece)
            start = next(values).clone() if base else torch.zeros((), dtype=torch.float64)
            for index, each in enumerate(values):
                norms[index] = math.hypot(norms[index], _norm(each - start))
    return norms


def scales(norms: Sequence[float], max_norm_ratio: float) -> list[float]:
    """Return the factor for each update, at most 1, with which no update exceeds the largest allowed norm.

    Args:
        norms: the norms of three agents or more, because the median of fewer norms proves nothing.
        max_norm_ratio: the largest allowed norm, as a multiple of the median; 0 allows every norm.
    """
    limit = max_norm_ratio * median(norms)
    return [limit / norm if max_norm_ratio and norm > limit else 1.0 for norm in norms]


def clip(weights: Path, base: Path | None, scale: float, target: Path) -> None:
    """Write the weights that the agent would have sent if its update had been `scale` times as long.

    Each floating-point tensor is interpolated between the base and the agent's weights, in float64. Running
    statistics are interpolated, too, although they do not count in the norm: otherwise an agent could send
    statistics of any size, which would dominate the mean with the others'. An interpolated variance is never
    below zero. Integers are taken from the agent. The memory does not depend on the size of the files.

    Args:
        weights: the file of the weights that the agent has sent.
        base: the file of the weights from which the agents started; None stands for zeros.
        scale: the factor for the update, from 0 to 1.
        target: the file to write.

    Raises:
        RunError: the files differ in names, shapes or dtypes, or a file contradicts its header.
        OSError: a file cannot be read or written.
    """
    files = Contributions([*([base] if base else []), weights])
    with writing(target, files.stored, PLAIN) as clipped:
        for name in files.schema:
            for begin, piece in files.pieces(name, PIECE_ELEMENTS):
                values = iter(piece)
                start = next(values).double().clone() if base else torch.zeros(1, dtype=torch.float64)
                own = next(values)
                # The formula is not start + scale * (own - start), because that difference may be infinite.
                part = own.double() * scale + start * (1 - scale) if own.is_floating_point() else own
                write_piece(clipped, name, begin, part.to(own.dtype))


def _norm(values: Tensor) -> float:
    """Return the Euclidean norm in float64, also if the sum of squares is beyond float64."""
    norm = float(torch.linalg.vector_norm(values))
    if math.isfinite(norm):
        return norm
    largest = float(values.abs().max())
    return largest * float(torch.linalg.vector_norm(values / largest)) if math.isfinite(largest) else largest
