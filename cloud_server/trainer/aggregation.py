"""Aggregation: the combination of all agents' weights into one state_dict.

The number of agents does not change the memory that aggregation takes. Every aggregator walks through the
tensors in pieces that fit into a processor's cache. It reads the same piece of every contribution, in the
order given, and reduces these pieces to that piece of the result. The mean adds the pieces up one by one. The
aggregators that need all values of a coordinate at once stack the pieces first. The more contributions there
are, the shorter these pieces. The stack is sorted by whole rows, because processors do that with vector
instructions. The files are read instead of mapped, because mapped pages count as the trainer's memory.
"""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecavg.cloud_server.trainer.pieces import (
    PIECE_ELEMENTS,
    Contributions,
    OnTensor,
    Piece,
    Reduction,
    torch_dtype,
)
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError
from ecavg.common.schema import read_header
from ecavg.common.weights import StateDict
from ecavg.common.wire import is_statistic

# The size of a stack of pieces, of all contributions together: at most 2 MiB, in float64.
STACK_ELEMENTS = 1 << 18
# The least length of one contribution's piece in a stack. Finding a shorter piece in its file would cost more
# than reading it. Beyond 256 contributions, a stack therefore grows by 8 KiB for each contribution.
MIN_STACKED_ELEMENTS = 1 << 10

# The least distance that the geometric median distinguishes, as a part of the median distance to it.
SMOOTHING = 1e-6
# The least distance whose reciprocal, and the reciprocal of its square, are finite.
LEAST_DISTANCE = 1e-150
# The weights of the geometric median are found when no weight changes by more than this part of itself.
TOLERANCE = 1e-12
MAX_ITERATIONS = 1000

FloatArray = npt.NDArray[np.floating[Any]]


def coefficients(num_examples: Sequence[int], weights: Literal["examples", "uniform"]) -> list[float]:
    """Return the coefficient of each contribution in the mean, as a multiple of one example or one agent.

    Raises:
        RunError: the mean is weighted by examples, and no contribution has any.
    """
    counts = [1.0 if weights == "uniform" else float(number) for number in num_examples]
    if sum(counts) <= 0:
        raise RunError('no contribution has any examples to be weighted by: set weights = "uniform"')
    return counts


def aggregate(
    paths: Sequence[Path],
    coefficients: Sequence[float],
    run: RunConfig,
    *,
    compared: Collection[str],
    on_tensor: OnTensor = lambda *_: None,
) -> StateDict:
    """Aggregate safetensors files with equal names, shapes and dtypes by the run's aggregator.

    Every aggregator computes in float64, and every tensor keeps its dtype. Floating-point results are rounded
    to that dtype; the results of integers and bools are rounded half to even.

    Args:
        paths: the files in agent-id order, because the order of a sum changes its last bits.
        coefficients: one for each path, not negative; only their ratios matter.
        run: the configuration of the run.
        compared: the names of the model's parameters, see `geometric_median`.
        on_tensor: a callback that gets the numbers of done tensors and of all tensors.

    Raises:
        RunError: the files differ in names, shapes or dtypes, or a file contradicts its header.
        InvalidError: a file is not a safetensors file.
        OSError: a file cannot be read.
    """
    return _aggregation(paths, coefficients, run, compared, on_tensor).in_memory()


def aggregate_into(
    target: Path,
    paths: Sequence[Path],
    coefficients: Sequence[float],
    run: RunConfig,
    *,
    on_tensor: OnTensor = lambda *_: None,
) -> None:
    """Write the aggregate of `aggregate` to a file, in memory that does not depend on the size of the files.

    The geometric median compares all tensors but running statistics, because no model says which are
    parameters.

    Raises:
        RunError: the files differ in names, shapes or dtypes, or a file contradicts its header.
        InvalidError: a file is not a safetensors file, or a value of the aggregate is not finite.
        OSError: a file cannot be read or written.
    """
    compared = [name for name in read_header(paths[0]).schema if not is_statistic(name)]
    _aggregation(paths, coefficients, run, compared, on_tensor).write(target)


def _aggregation(
    paths: Sequence[Path],
    coefficients: Sequence[float],
    run: RunConfig,
    compared: Collection[str],
    on_tensor: OnTensor,
) -> Reduction:
    match run.aggregator:
        case "mean":
            return _mean(paths, coefficients, on_tensor)
        case "trimmed_mean":
            return _trimmed_mean(paths, _num_trimmed(len(paths), run.trim_fraction), on_tensor)
        case "median":
            return _trimmed_mean(paths, _num_beside_median(len(paths)), on_tensor)
        case "geometric_median":
            return _geometric_median(paths, coefficients, compared, on_tensor)


def mean(
    paths: Sequence[Path], coefficients: Sequence[float], *, on_tensor: OnTensor = lambda *_: None
) -> StateDict:
    """Return the weighted mean Σ cᵢ·xᵢ / Σ cᵢ (FedAvg, arXiv 1602.05629, algorithm 1); see `aggregate`."""
    return _mean(paths, coefficients, on_tensor).in_memory()


def _mean(paths: Sequence[Path], coefficients: Sequence[float], on_tensor: OnTensor) -> Reduction:
    total = sum(coefficients)

    def reduce(piece: Piece, result: Tensor) -> None:
        for coefficient, values in zip(coefficients, piece, strict=True):
            result.add_(values, alpha=coefficient)
        result.div_(total)

    return Reduction(Contributions(paths), PIECE_ELEMENTS, reduce, on_tensor)


def trimmed_mean(
    paths: Sequence[Path], trim_fraction: float, *, on_tensor: OnTensor = lambda *_: None
) -> StateDict:
    """Return the mean of each coordinate without its smallest and largest values; see `aggregate`.

    Of K values the ⌊trim_fraction·K⌋ smallest and as many largest are dropped (Yin et al., arXiv 1803.01498,
    definition 2). There are no coefficients: a contribution that claims many examples counts once. With fewer
    than 1/trim_fraction contributions no value is dropped.

    Args:
        paths: the files in agent-id order.
        trim_fraction: from 0 to less than 0.5.
        on_tensor: a callback that gets the numbers of done tensors and of all tensors.
    """
    return _trimmed_mean(paths, _num_trimmed(len(paths), trim_fraction), on_tensor).in_memory()


def median(paths: Sequence[Path], *, on_tensor: OnTensor = lambda *_: None) -> StateDict:
    """Return the median of each coordinate (Yin et al., arXiv 1803.01498, definition 1); see `aggregate`.

    The median of an even number of values is the mean of the two in the middle. There are no coefficients.
    """
    return _trimmed_mean(paths, _num_beside_median(len(paths)), on_tensor).in_memory()


def _num_trimmed(num_contributions: int, trim_fraction: float) -> int:
    # The fraction is taken as its decimal digits say, because 0.29·100 is less than 29 in floating point.
    return math.floor(Fraction(str(trim_fraction)) * num_contributions)


def _num_beside_median(num_contributions: int) -> int:
    return (num_contributions - 1) // 2


def geometric_median(
    paths: Sequence[Path],
    coefficients: Sequence[float],
    *,
    compared: Collection[str],
    on_tensor: OnTensor = lambda *_: None,
) -> StateDict:
    """Return the geometric median of the contributions; see `aggregate`.

    The geometric median is the point z with the least Σ cᵢ·‖xᵢ - z‖ (RFA, Pillutla et al., arXiv 1912.13445).
    No minority can move this point far. If one contribution has more than half of the sum of the
    coefficients, then this contribution is the geometric median: the larger one of two, for example.

    The geometric median is a weighted mean of the contributions. The files are read twice, once to find the
    weights of this mean from the distances, and once to compute the mean.

    Args:
        paths: the files in agent-id order.
        coefficients: one for each path, not negative; only their ratios matter.
        compared: the names of the tensors in which distances are measured, which are the model's parameters.
            Tensors that are not floating point do not count. Running statistics are not compared, because
            they are in the units of activations, or in their square, and could outvote all weights.
        on_tensor: a callback that gets the numbers of done tensors and of all tensors.

    Raises:
        RunError: as in `aggregate`, or a distance is beyond float64.
    """
    return _geometric_median(paths, coefficients, compared, on_tensor).in_memory()


def _geometric_median(
    paths: Sequence[Path], coefficients: Sequence[float], compared: Collection[str], on_tensor: OnTensor
) -> Reduction:
    contributions, factors = Contributions(paths), np.asarray(coefficients, np.float64)
    schema = contributions.schema
    names = [name for name in schema if name in compared and torch_dtype(schema[name]).is_floating_point]
    num_steps = len(names) + len(schema)
    gram, scratch = np.zeros((len(paths), len(paths))), _scratch(len(paths))
    for done, name in enumerate(names, start=1):
        for _, piece in contributions.pieces(name, scratch.shape[1]):
            gram += _centred_gram(_stacked(piece, scratch, torch.float64), factors)
        on_tensor(done, num_steps)
    if not np.isfinite(gram).all():
        raise RunError('the contributions are too large for geometric_median: set aggregator = "median"')
    weights = _geometric_median_weights(gram, factors)
    return _mean(paths, weights.tolist(), lambda done, _: on_tensor(len(names) + done, num_steps))


def _trimmed_mean(paths: Sequence[Path], num_dropped: int, on_tensor: OnTensor) -> Reduction:
    """Return the mean of each coordinate without its `num_dropped` smallest and as many largest values."""
    kept = range(num_dropped, len(paths) - num_dropped)
    scratch = _scratch(len(paths))

    def reduce(piece: Piece, result: Tensor) -> None:
        stack = _stacked(piece, scratch)
        rows = np.sort(stack, axis=0)
        for index in kept:
            result.add_(torch.from_numpy(rows[index]))
        result.div_(len(kept))

    return Reduction(Contributions(paths), scratch.shape[1], reduce, on_tensor)


def _scratch(num_contributions: int) -> Tensor:
    """Return the memory for stacks of pieces: float64 [K, n], with the length n of a contribution's piece."""
    num_elements = min(PIECE_ELEMENTS, max(STACK_ELEMENTS // num_contributions, MIN_STACKED_ELEMENTS))
    return torch.empty(num_contributions, num_elements, dtype=torch.float64)


def _stacked(piece: Piece, scratch: Tensor, dtype: torch.dtype | None = None) -> FloatArray:
    """Return the values of all contributions as one array [K, n], which lies in the scratch memory.

    Args:
        piece: the same piece of every contribution.
        scratch: the memory from `_scratch`.
        dtype: the dtype of the array. None takes float32 for floating-point values that float32 holds
            exactly, and float64 for all other values.
    """
    stack = scratch
    for index, values in enumerate(piece):
        if index == 0:
            is_short = values.is_floating_point() and values.dtype != torch.float64
            flat = scratch.view(-1).view(dtype or (torch.float32 if is_short else torch.float64))
            stack = flat[: len(scratch) * len(values)].view(len(scratch), len(values))
        stack[index] = values
    return stack.numpy()


def _centred_gram(stack: FloatArray, coefficients: FloatArray) -> FloatArray:
    """Return the inner products [K, K] of the contributions' differences to the most central contribution.

    The most central contribution is the one with the least sum of distances to the others. The function
    overwrites the stack [K, n].

    The distances between contributions follow from the inner products of their differences to any one point.
    But if that point were a far outlier, all differences would have the same leading digits, and rounding
    would destroy the digits in which they differ.
    """
    nearest = np.argmin(_distances(stack @ stack.T) @ coefficients)
    stack -= stack[nearest].copy()
    return np.asarray(stack @ stack.T)


def _distances(gram: FloatArray) -> FloatArray:
    """Return the distances of all pairs, [K, K], from ‖xᵢ - xⱼ‖² = ‖xᵢ‖² + ‖xⱼ‖² - 2·xᵢ·xⱼ."""
    squares = gram.diagonal()
    return _root(squares[:, None] + squares - 2 * gram)


def _root(squares: FloatArray) -> FloatArray:
    """Return the square roots; a square that rounding has made negative counts as 0."""
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _geometric_median_weights(gram: FloatArray, coefficients: FloatArray) -> FloatArray:
    """Return the weights, with sum 1, by which the mean of the contributions is their geometric median.

    The function runs the smoothed Weiszfeld algorithm (arXiv 1912.13445), which begins with the mean. Each
    iterate is a weighted mean of the contributions; a weight is the coefficient of the contribution divided
    by its distance to the previous iterate. So an iterate is known by its weights, and the inner products
    give all distances to it.

    A distance below the smoothing counts as the smoothing, because otherwise an iterate that meets a
    contribution would stay there. The smoothing is a part of the median distance, because a far outlier would
    dominate every other measure, such as the mean distance.

    Args:
        gram: the inner products [K, K] of the contributions' differences to a point near most of them.
        coefficients: the coefficients of the contributions, [K].
    """
    weights: FloatArray = coefficients / coefficients.sum()
    for _ in range(MAX_ITERATIONS):
        products = gram @ weights
        # These are the distances ‖xᵢ - Σ wⱼ·xⱼ‖ to the iterate.
        distances = _root(gram.diagonal() - 2 * products + weights @ products)
        smoothing = max(SMOOTHING * _weighted_median(distances, coefficients), LEAST_DISTANCE)
        previous, weights = weights, coefficients / np.maximum(distances, smoothing)
        weights /= weights.sum()
        if np.all(np.abs(weights - previous) <= TOLERANCE * weights):
            break
    return weights


def _weighted_median(values: FloatArray, coefficients: FloatArray) -> float:
    """Return the least value that, with all smaller ones, has at least half of all coefficients' sum."""
    order = values.argsort()
    held = coefficients[order].cumsum()
    return float(values[order][np.searchsorted(held, held[-1] / 2)])
