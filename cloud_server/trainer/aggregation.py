"""Aggregation: the weighted mean of the agents' weights, in memory that their number does not change.

Each tensor is averaged in pieces that stay in a processor's cache: a piece of every contribution is
read, in the order given, and added to the piece of the sum. The files are read rather than mapped,
because mapped pages count as the trainer's memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.errors import RunError
from common.schema import read_header
from common.weights import StateDict

# The largest that PyTorch adds in one thread: waking others for it costs more than it saves, and on a
# busy machine many times more.
PIECE_ELEMENTS = 1 << 15

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def coefficients(num_examples: Sequence[int], weights: Literal["examples", "uniform"]) -> list[float]:
    """What each contribution counts in the mean, as a multiple of one example or one agent.

    Raises:
        RunError: there is nothing to weight by.
    """
    counts = [1.0 if weights == "uniform" else float(number) for number in num_examples]
    if sum(counts) <= 0:
        raise RunError('no contribution has any examples to be weighted by: set weights = "uniform"')
    return counts


def mean(
    paths: Sequence[Path],
    coefficients: Sequence[float],
    *,
    on_tensor: Callable[[int, int], None] = lambda *_: None,
) -> StateDict:
    """The mean of safetensors files with equal names, shapes and dtypes: Σ cᵢ·xᵢ / Σ cᵢ, in float64.

    Every tensor keeps its dtype. Floating-point means are rounded to it; those of integers and bools
    are rounded half to even. (FedAvg, arXiv 1602.05629, algorithm 1.)

    Args:
        paths: in agent-id order: the order of a sum shows in its last bits.
        coefficients: one for each path, not negative; only their ratios matter.
        on_tensor: told how many tensors, of how many, are done.

    Raises:
        RunError: the files differ, or do not hold what their headers say.
        InvalidError: one is no safetensors file.
        OSError: one cannot be read.
    """
    headers = [read_header(path) for path in paths]
    schema = headers[0].schema
    if any(header.schema != schema for header in headers):
        raise RunError("the contributions have different names, shapes or dtypes: there is no mean of them")
    averaged: StateDict = {}
    for name, (dtype, shape) in schema.items():
        mean_tensor = averaged[name] = torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        starts = [header.data_start + header.offsets[name][0] for header in headers]
        _average_into(mean_tensor, list(zip(paths, starts, coefficients, strict=True)))
        on_tensor(len(averaged), len(schema))
    return averaged


def _average_into(mean_tensor: Tensor, contributions: Sequence[tuple[Path, int, float]]) -> None:
    """Fill the tensor; a contribution is a file, the offset of the tensor there, and its coefficient."""
    flat = mean_tensor.view(-1)
    total = sum(coefficient for _, _, coefficient in contributions)
    values = torch.empty_like(flat[:PIECE_ELEMENTS])
    sums = torch.empty_like(values, dtype=torch.float64)
    for begin in range(0, len(flat), PIECE_ELEMENTS):
        piece = flat[begin : begin + PIECE_ELEMENTS]
        values, sums = values[: len(piece)], sums[: len(piece)].zero_()
        for path, start, coefficient in contributions:
            _read_into(values, path, start + begin * values.element_size())
            sums.add_(values, alpha=coefficient)
        sums.div_(total)
        # Casting to an integer would cut off instead of rounding.
        piece.copy_(sums if piece.is_floating_point() else sums.round_())


def _read_into(values: Tensor, path: Path, offset: int) -> None:
    data = values.view(torch.uint8).numpy().data
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(data) != len(data):
            raise RunError(f"{path} ends within its data")
