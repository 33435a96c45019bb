"""How far each agent's update goes, and what is done about one that goes too far.

An update is what an agent sends minus what the round started from. Its norm is the Euclidean one over all
floating-point tensors but BatchNorm's running statistics, which are in the units of activations. Clipping
leaves its direction and bounds what one agent can do (Sun et al., Can You Really Backdoor Federated
Learning?, arXiv 1911.07963); the bound follows the median of the round, since nobody knows beforehand how
far a round's training goes, and a minority cannot move the median out of the range of the others.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from cloud_server.trainer.aggregation import PIECE_ELEMENTS, Contributions, torch_dtype
from common.weights import StateDict, write_state_dict
from common.wire import is_statistic


def update_norms(paths: Sequence[Path], base: Path | None) -> list[float]:
    """The norm of each update, in float64, in memory that neither files nor tensors change.

    Args:
        paths: safetensors files with equal names, shapes and dtypes.
        base: one more of them, what all have started from; None: they have nothing in common, so these are
            the norms of the weights themselves.

    Returns:
        Infinity where the norm is beyond float64.

    Raises:
        RunError: the files differ, or do not hold what their headers say.
        OSError: one cannot be read.
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
    """What each update is to be multiplied with, 1 at most, so that none goes too far.

    Args:
        norms: of three agents or more: of fewer, the median is no witness.
        max_norm_ratio: the largest norm allowed, as a multiple of the median; 0: any is.
    """
    limit = max_norm_ratio * median(norms)
    return [limit / norm if max_norm_ratio and norm > limit else 1.0 for norm in norms]


def clip(weights: Path, base: Path | None, scale: float, target: Path) -> None:
    """Write what an agent would have sent, had its update been `scale` times as long; one model is in memory.

    All floating-point tensors go from the base's to the agent's by this part of the way, computed in
    float64. The running statistics do so with the weights that they belong to: left as they are, those of
    one agent could still be as large as it likes, in a mean with the others'. A part of the way between two
    variances is none below zero. Integers are the agent's.

    Raises:
        RunError: as update_norms.
        OSError: one cannot be read or written.
    """
    files = Contributions([*([base] if base else []), weights])
    clipped: StateDict = {}
    for name, spec in files.schema.items():
        tensor = clipped[name] = torch.empty(spec.shape, dtype=torch_dtype(spec))
        for begin, piece in files.pieces(name, PIECE_ELEMENTS):
            values = iter(piece)
            start = next(values).to(torch.float64, copy=True) if base else torch.zeros(1, dtype=torch.float64)
            own = next(values)
            # Not start + scale * (own - start): that difference may be infinite.
            part = own.double() * scale + start * (1 - scale) if own.is_floating_point() else own
            tensor.view(-1)[begin : begin + len(own)] = part
    write_state_dict(clipped, target)


def _norm(values: Tensor) -> float:
    """The Euclidean norm, float64, also where the squares are beyond it."""
    norm = float(torch.linalg.vector_norm(values))
    if math.isfinite(norm):
        return norm
    largest = float(values.abs().max())
    return largest * float(torch.linalg.vector_norm(values / largest)) if math.isfinite(largest) else largest
