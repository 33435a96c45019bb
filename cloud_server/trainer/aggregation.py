"""Aggregation: one set of weights from those of all agents, in memory that their number does not change.

Every aggregator walks the tensors in pieces that stay in a processor's cache: a piece of every
contribution is read, in the order given, and reduced to the piece of the result. The mean adds them up one
by one; what has to see all values of a coordinate stacks them first, in shorter pieces the more there are,
and sorts them by whole rows, which processors do in vectors. The files are read rather than mapped, because
mapped pages count as the trainer's memory.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.config import RunConfig
from common.errors import RunError
from common.schema import TensorSpec, read_header
from common.weights import StateDict

# The largest that PyTorch adds in one thread: waking others for it costs more than it saves, and on a
# busy machine many times more.
PIECE_ELEMENTS = 1 << 15
STACK_ELEMENTS = 1 << 18  # of all contributions together, in float64 at most: 2 MiB
# Of one contribution: shorter ones would cost more to find than to read. So that beyond 256 contributions
# each takes 8 KiB more.
MIN_STACKED_ELEMENTS = 1 << 10

SMOOTHING = 1e-6  # of the geometric median, as a part of the median distance to it
LEAST_DISTANCE = 1e-150  # one over it, and over its square, is still a number
TOLERANCE = 1e-12  # its weights are found when none changes by more than this part of itself
MAX_ITERATIONS = 1000

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

OnTensor = Callable[[int, int], None]  # told how many tensors, of how many, are done
FloatArray = npt.NDArray[np.floating[Any]]

# The values [n] of one piece, of every contribution in turn, each gone when the next is asked for.
Piece = Iterable[Tensor]
# Fills the result, float64 [n], given as zeros.
Reducer = Callable[[Piece, Tensor], None]


def coefficients(num_examples: Sequence[int], weights: Literal["examples", "uniform"]) -> list[float]:
    """What each contribution counts in the mean, as a multiple of one example or one agent.

    Raises:
        RunError: there is nothing to weight by.
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
    """What the run's aggregator makes of safetensors files with equal names, shapes and dtypes.

    Every aggregator computes in float64, and every tensor keeps its dtype: floating-point results are
    rounded to it, those of integers and bools are rounded half to even.

    Args:
        paths: in agent-id order: the order of a sum shows in its last bits.
        coefficients: one for each path, not negative; only their ratios matter.
        compared: the names of the model's parameters, see `geometric_median`.
        on_tensor: told how many tensors, of how many, are done.

    Raises:
        RunError: the files differ, or do not hold what their headers say.
        InvalidError: one is no safetensors file.
        OSError: one cannot be read.
    """
    match run.aggregator:
        case "mean":
            return mean(paths, coefficients, on_tensor=on_tensor)
        case "trimmed_mean":
            return trimmed_mean(paths, run.trim_fraction, on_tensor=on_tensor)
        case "median":
            return median(paths, on_tensor=on_tensor)
        case "geometric_median":
            return geometric_median(paths, coefficients, compared=compared, on_tensor=on_tensor)


def mean(
    paths: Sequence[Path], coefficients: Sequence[float], *, on_tensor: OnTensor = lambda *_: None
) -> StateDict:
    """The weighted mean Σ cᵢ·xᵢ / Σ cᵢ (FedAvg, arXiv 1602.05629, algorithm 1); see `aggregate`."""
    total = sum(coefficients)

    def reduce(piece: Piece, result: Tensor) -> None:
        for coefficient, values in zip(coefficients, piece, strict=True):
            result.add_(values, alpha=coefficient)
        result.div_(total)

    return _reduce(Contributions(paths), PIECE_ELEMENTS, reduce, on_tensor)


def trimmed_mean(
    paths: Sequence[Path], trim_fraction: float, *, on_tensor: OnTensor = lambda *_: None
) -> StateDict:
    """The mean of what is left of each coordinate without its smallest and largest values; see `aggregate`.

    Of K values the ⌊trim_fraction·K⌋ smallest and as many largest are dropped (Yin et al., arXiv 1803.01498,
    definition 2). The coefficients play no part: a contribution that claims many examples counts once.
    With fewer than 1/trim_fraction contributions nothing is dropped.

    Args:
        trim_fraction: from 0 to less than 0.5.
    """
    # As it was written: 0.29·100 is less than 29 in floating point.
    return _trimmed_mean(paths, math.floor(Fraction(str(trim_fraction)) * len(paths)), on_tensor)


def median(paths: Sequence[Path], *, on_tensor: OnTensor = lambda *_: None) -> StateDict:
    """The median of each coordinate, of an even number the mean of the two in the middle; see `aggregate`.

    (Yin et al., arXiv 1803.01498, definition 1.) The coefficients play no part.
    """
    return _trimmed_mean(paths, (len(paths) - 1) // 2, on_tensor)


def geometric_median(
    paths: Sequence[Path],
    coefficients: Sequence[float],
    *,
    compared: Collection[str],
    on_tensor: OnTensor = lambda *_: None,
) -> StateDict:
    """The weighted mean with the weights of the geometric median; see `aggregate`.

    That is the point z with the least Σ cᵢ·‖xᵢ - z‖ (RFA, Pillutla et al., arXiv 1912.13445), which no
    minority can move far. A contribution with more than half of the sum of the coefficients, as one of two
    with more examples than the other, is itself the geometric median.

    The files are read twice, once for the distances and once for the mean.

    Args:
        compared: the names of the tensors in which distances are measured, those that are not floating
            point left out: the model's parameters. Running statistics are in the units of activations
            (variances in their square), so that large ones would outvote all weights.

    Raises:
        RunError: also when distances are beyond what float64 holds.
    """
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
    return mean(paths, weights.tolist(), on_tensor=lambda done, _: on_tensor(len(names) + done, num_steps))


class Contributions:
    """Safetensors files with equal names, shapes and dtypes, read side by side."""

    def __init__(self, paths: Sequence[Path]) -> None:
        headers = [read_header(path) for path in paths]
        self.schema = headers[0].schema
        if any(header.schema != self.schema for header in headers):
            raise RunError("the contributions have different names, shapes or dtypes")
        self._files = list(zip(paths, headers, strict=True))

    def pieces(self, name: str, max_elements: int) -> Iterator[tuple[int, Piece]]:
        """One piece of a tensor after the other, and where in the tensor it begins."""
        dtype, num_elements = torch_dtype(self.schema[name]), math.prod(self.schema[name].shape)
        buffer = torch.empty(min(max_elements, num_elements), dtype=dtype)
        for begin in range(0, num_elements, max_elements):
            yield begin, self._piece(name, begin, buffer[: num_elements - begin])

    def _piece(self, name: str, begin: int, values: Tensor) -> Iterator[Tensor]:
        data = values.view(torch.uint8).numpy().data
        for path, header in self._files:
            with path.open("rb") as file:
                file.seek(header.data_start + header.offsets[name][0] + begin * values.element_size())
                if file.readinto(data) != len(data):
                    raise RunError(f"{path} ends within its data")
            yield values


def _reduce(
    contributions: Contributions, max_elements: int, reduce: Reducer, on_tensor: OnTensor
) -> StateDict:
    """Every tensor, reduced piece by piece."""
    reduced: StateDict = {}
    for name, spec in contributions.schema.items():
        tensor = reduced[name] = torch.empty(spec.shape, dtype=torch_dtype(spec))
        flat = tensor.view(-1)
        buffer = torch.empty_like(flat[:max_elements], dtype=torch.float64)
        for begin, piece in contributions.pieces(name, max_elements):
            target = flat[begin : begin + max_elements]
            result = buffer[: len(target)].zero_()
            reduce(piece, result)
            # Casting to an integer would cut off instead of rounding.
            target.copy_(result if target.is_floating_point() else result.round_())
        on_tensor(len(reduced), len(contributions.schema))
    return reduced


def _trimmed_mean(paths: Sequence[Path], num_dropped: int, on_tensor: OnTensor) -> StateDict:
    """The mean of each coordinate without so many values at either end: down to the median."""
    kept = range(num_dropped, len(paths) - num_dropped)
    scratch = _scratch(len(paths))

    def reduce(piece: Piece, result: Tensor) -> None:
        stack = _stacked(piece, scratch)
        rows = np.sort(stack, axis=0)
        for index in kept:
            result.add_(torch.from_numpy(rows[index]))
        result.div_(len(kept))

    return _reduce(Contributions(paths), scratch.shape[1], reduce, on_tensor)


def _scratch(num_contributions: int) -> Tensor:
    """Where pieces of all contributions are stacked: float64 [K, n], n being how long these pieces are."""
    num_elements = min(PIECE_ELEMENTS, max(STACK_ELEMENTS // num_contributions, MIN_STACKED_ELEMENTS))
    return torch.empty(num_contributions, num_elements, dtype=torch.float64)


def _stacked(piece: Piece, scratch: Tensor, dtype: torch.dtype | None = None) -> FloatArray:
    """The values of all contributions, [K, n], in the scratch memory.

    Args:
        dtype: None: float32 where that holds the values exactly, as of floats it does, or else float64.
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
    """The inner products [K, K] of the contributions' differences to the one nearest to all others.

    The stack [K, n] is overwritten.

    Distances follow from inner products of differences to whatever point. But next to one that lies far
    from the others, as a far outlier does, these would all have the same leading digits and lose their own.
    """
    nearest = np.argmin(_distances(stack @ stack.T) @ coefficients)
    stack -= stack[nearest].copy()
    return np.asarray(stack @ stack.T)


def _distances(gram: FloatArray) -> FloatArray:
    """Those between all pairs, [K, K]: ‖xᵢ - xⱼ‖² = ‖xᵢ‖² + ‖xⱼ‖² - 2·xᵢ·xⱼ."""
    squares = gram.diagonal()
    return _root(squares[:, None] + squares - 2 * gram)


def _root(squares: FloatArray) -> FloatArray:
    """The square root, of 0 where rounding left less than that."""
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _geometric_median_weights(gram: FloatArray, coefficients: FloatArray) -> FloatArray:
    """The weights of the contributions, with sum 1, whose mean is their geometric median.

    The smoothed Weiszfeld algorithm (arXiv 1912.13445): each iterate is the mean weighted by coefficients
    over distances to the iterate before, beginning with the mean; so its weights are all that is needed of
    it, and with them the inner products give all distances. A distance below the smoothing counts as that,
    since an iterate at a contribution would stay there. The smoothing follows the median distance, because
    any measure with a far outlier in it would drown all other distances.

    Args:
        gram: the inner products [K, K] of the contributions' differences to some point near most of them.
    """
    weights: FloatArray = coefficients / coefficients.sum()
    for _ in range(MAX_ITERATIONS):
        products = gram @ weights
        distances = _root(gram.diagonal() - 2 * products + weights @ products)  # ‖xᵢ - Σ wⱼ·xⱼ‖
        smoothing = max(SMOOTHING * _weighted_median(distances, coefficients), LEAST_DISTANCE)
        previous, weights = weights, coefficients / np.maximum(distances, smoothing)
        weights /= weights.sum()
        if np.all(np.abs(weights - previous) <= TOLERANCE * weights):
            break
    return weights


def _weighted_median(values: FloatArray, coefficients: FloatArray) -> float:
    """The least value that, with all smaller ones, has at least half of the sum of the coefficients."""
    order = values.argsort()
    held = coefficients[order].cumsum()
    return float(values[order][np.searchsorted(held, held[-1] / 2)])


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """PyTorch's name for it."""
    return _TORCH_DTYPES[spec.dtype]
