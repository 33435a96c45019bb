"""Batches: the order of an epoch, its batches, and how the inputs in them are changed.

Shapes: B examples of a batch, N of a data set, C channels, H height, W width.
"""

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ecavg.common.dataset import DatasetSpec, Inputs
from ecavg.common.errors import UsageError
from ecavg.common.mapped import MappedRows, Rows

# So many pixels are added on each side, as usual for 32x32 images (He et al., arXiv 1512.03385, 4.2).
CROP_PADDING = 4
# So many batches are made ready ahead of the step, where the images are not on the device.
NUM_AHEAD = 2

_Part = TypeVar("_Part")
_Made = TypeVar("_Made")


class DeviceData:
    """Inputs with their targets, on the device where they fit; the inputs come out normalised.

    Rows that are in files stay there, and each part is read when it is its turn.

    Args:
        inputs: [N, …], of the dtype of `spec.inputs`.
        targets: any number of tensors [N, …], such as labels.

    Attributes:
        device: the device on which the inputs come out.
        home: the device on which they are kept.

    Raises:
        ValueError: inputs of another dtype, or not as many targets.
    """

    def __init__(
        self, inputs: Rows, spec: DatasetSpec, device: torch.device, targets: Sequence[Rows] = ()
    ) -> None:
        wanted = spec.inputs.dtype
        if str(inputs.dtype) != f"torch.{wanted}" or any(len(target) != len(inputs) for target in targets):
            found = ", ".join(f"{len(tensor)} {tensor.dtype}" for tensor in (inputs, *targets))
            raise ValueError(f"{wanted} inputs and as many targets are wanted, not {found}")
        self.device = device
        tensors = [rows for rows in (inputs, *targets) if isinstance(rows, Tensor)]
        self._is_resident = len(tensors) == 1 + len(targets) and _fits(tensors, device)
        self.home = device if self._is_resident else inputs.device
        self._rows: list[Rows] = [
            rows if isinstance(rows, MappedRows) else rows.to(self.home) for rows in (inputs, *targets)
        ]
        self._scaling = _scaling(spec.inputs, device)

    def __len__(self) -> int:
        return len(self._rows[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        return tuple(self._rows[0].shape[1:])

    def normalise(self, inputs: Tensor) -> Tensor:
        """Return inputs on the device as a model gets them.

        They are float32 with the mean and the deviation of the dataset, or as they are where it has none;
        int64 inputs always stay as they are.
        """
        if self._scaling is None:
            return inputs
        shift, scale = self._scaling
        return torch.addcmul(shift, inputs.float(), scale)

    def rows(self, parts: Iterable[Tensor | slice]) -> Generator[list[Tensor]]:
        """Yield the inputs and the targets of each part in turn, [B, …] on the device.

        Inputs that are not on the device are gathered by a thread, ahead of need. The thread ends with the
        generator, so a caller that may stop early closes it.

        Args:
            parts: slices, or indices (int64 [B], at home).
        """
        if self._is_resident:
            for part in parts:
                yield self._gather(part)
            return
        with closing(_ahead(self._gather, parts)) as gathered:
            for rows in gathered:
                # Only the caller's thread puts work on the device, so all of it is in one order.
                yield [row.to(self.device, non_blocking=True) for row in rows]

    def _gather(self, part: Tensor | slice) -> list[Tensor]:
        """Return the inputs and targets of a part, at home; pinned if they are still to go to a GPU."""
        rows = [each[part] for each in self._rows]
        is_to_go = self.device.type == "cuda" and not self._is_resident
        return [row.pin_memory() for row in rows] if is_to_go else rows


def _ahead(make: Callable[[_Part], _Made], parts: Iterable[_Part]) -> Generator[_Made]:
    """Yield what a thread makes of each part in turn; it is at most `NUM_AHEAD` parts ahead.

    An error in the thread is raised here. The thread ends with the generator.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
    made: deque[Future[_Made]] = deque()
    try:
        for part in parts:
            made.append(executor.submit(make, part))
            if len(made) > NUM_AHEAD:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


class Batch(NamedTuple):
    """The examples of a step as they are kept, and the random choices about them; all on the device."""

    # The inputs, [B, …].
    inputs: Tensor
    # The targets, [B, …].
    targets: Tensor
    # The corners for random_crop, int64.
    corners_B2: Tensor
    # Whether to mirror, for horizontal_flip, bool.
    flipped_B: Tensor

    def augmented(self, data: DeviceData, augment: Collection[str]) -> Tensor:
        """Return the inputs [B, …], normalised and augmented.

        Args:
            augment: any of "random_crop" and "horizontal_flip", for pictures [B, C, H, W] alone.
        """
        x_BCHW = data.normalise(self.inputs)
        if "random_crop" in augment:
            x_BCHW = random_crop(x_BCHW, self.corners_B2)
        if "horizontal_flip" in augment:
            x_BCHW = horizontal_flip(x_BCHW, self.flipped_B)
        return x_BCHW


class Draws(NamedTuple):
    """The random choices about one epoch's data, on the CPU."""

    # The indices, int64.
    order_N: Tensor
    # The corners for random_crop, int64.
    corners_N2: Tensor
    # Whether to mirror, for horizontal_flip, bool.
    flipped_N: Tensor

    def batches(self, data: DeviceData, parts: Iterable[slice]) -> Generator[Batch]:
        """Yield the batch of each part of the order in turn; a caller that may stop early closes this."""
        # The order stays where the images are, so no step waits for indices to come back from the device.
        order_N = self.order_N.to(data.home)
        corners_N2, flipped_N = self.corners_N2.to(data.device), self.flipped_N.to(data.device)
        parts = list(parts)
        with closing(data.rows(order_N[part] for part in parts)) as rows:
            for part, (inputs, targets) in zip(parts, rows, strict=True):
                yield Batch(inputs, targets, corners_N2[part], flipped_N[part])


def draw_epoch(num_examples: int, seed: int, balanced_N: Tensor | None = None) -> Draws:
    """Draw for one epoch, on the CPU, so that every device and rank sees the same.

    Args:
        balanced_N: labels, int64 on the CPU, for a balanced order; None: the order is a permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    if balanced_N is None:
        order = torch.randperm(num_examples, generator=generator)
    else:
        order = balanced_order(balanced_N, generator)
    corners = torch.randint(2 * CROP_PADDING + 1, (num_examples, 2), generator=generator)
    flipped = torch.rand(num_examples, generator=generator) < 0.5
    return Draws(order, corners, flipped)


def balanced_order(labels_N: Tensor, generator: torch.Generator) -> Tensor:
    """Return indices, int64 [N], that draw each class equally often, or once more than another.

    The same holds for the examples within a class. The order is random.

    Args:
        labels_N: int64, on the CPU.
    """
    sizes = labels_N.bincount()
    sizes = sizes[sizes > 0]
    share, num_larger = divmod(len(labels_N), len(sizes))
    quotas = torch.full_like(sizes, share)
    quotas[torch.randperm(len(sizes), generator=generator)[:num_larger]] += 1
    drawn = []
    by_class = torch.tensor_split(labels_N.argsort(stable=True), sizes.cumsum(0)[:-1])
    for members, quota in zip(by_class, quotas.tolist(), strict=True):
        repeats, rest = divmod(quota, len(members))
        some = torch.randperm(len(members), generator=generator)[:rest]
        drawn += [members.repeat(repeats), members[some]]
    return torch.cat(drawn)[torch.randperm(len(labels_N), generator=generator)]


def batch_bounds(num_images: int, batch_size: int, smallest: int) -> list[tuple[int, int]]:
    """Return begin and end of each batch; a last one of fewer than `smallest` images joins the one before.

    Raises:
        UsageError: no batch can be made, or only too small ones.
    """
    if min(num_images, batch_size) < smallest:
        raise UsageError(
            f"cannot train on {num_images} images in batches of {batch_size}:"
            f" this model needs at least {smallest} images in a batch"
        )
    starts = list(range(0, num_images, batch_size))
    if num_images - starts[-1] < smallest:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def random_crop(x_BCHW: Tensor, corners_B2: Tensor) -> Tensor:
    """Pad with zeros and cut the old size out again, each image from its own top left corner.

    Args:
        x_BCHW: any dtype; normalised, so that zero is the mean colour.
        corners_B2: int64, row and column, 0 to 2 * CROP_PADDING.
    """
    num_images, _, height, width = x_BCHW.shape
    padded = F.pad(x_BCHW, (CROP_PADDING,) * 4)
    # This is a view [B, C, row, column, H, W].
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    every = torch.arange(num_images, device=x_BCHW.device)
    return windows[every, :, corners_B2[:, 0], corners_B2[:, 1]]


def horizontal_flip(x_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror the images for which `flipped_B` (bool) is true."""
    return torch.where(flipped_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


def _scaling(inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return what is added to inputs, and what they are multiplied by before; None: they stay as they are."""
    if not inputs.mean:
        return None
    along_first = (-1, *(1 for _ in inputs.shape[1:]))
    mean, std = (torch.tensor(values).view(along_first) for values in (inputs.mean, inputs.std))
    largest = 255 if inputs.dtype == "uint8" else 1
    return (-mean / std).to(device), (1 / (largest * std)).to(device)


def _fits(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Return True if the examples may all stay on the device: half of its free memory is left to train."""
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    return device.type == "cpu" or num_bytes < torch.cuda.mem_get_info(device)[0] // 2
