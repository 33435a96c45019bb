"""The train and the test part of a source, and examples that are in memory already.

Pictures of every source come out in the run's shape: resized where height or width differ (the aspect ratio
is not kept), grey repeated into RGB, RGB weighted into grey.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import UsageError
from ecavg.common.shards import Shard
from ecavg.edge_agent.arrays import Arrays, as_wanted


class Split(Protocol):
    """The train or the test part of a source."""

    @property
    def targets(self) -> np.ndarray:
        """Return the targets, [N, …]; of masks, which are read later, [N, 0]; of recordings one for each."""

    @property
    def noun(self) -> str:
        """Return what a user calls one of them: "image", "recording" or "example"."""

    @property
    def is_series(self) -> bool:
        """Return True if examples that overlap stand beside each other, in the order of time."""

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Return these examples as the run's, and how many could not be read and are left out.

        Args:
            on_read: called now and then with how many were read, and with their number.
        """

    def check_some(self) -> None:
        """Read a few examples from files; raise UsageError if one of them cannot be read."""


class Source(NamedTuple):
    """The train and the test split of a source; `test` is None if there is none."""

    train: Split
    test: Split | None


@dataclass(frozen=True)
class ArraySplit:
    """A split that is in memory already, or mapped into it; pictures are in their own shape."""

    # The inputs, [N, …].
    inputs: np.ndarray
    # The targets, [N, …].
    targets: np.ndarray

    # Where they overlap, they are in the order of time.
    is_series: ClassVar = True

    @property
    def noun(self) -> str:
        """Return "image" if the inputs are pictures, uint8 [N, C, H, W]."""
        return "image" if self.inputs.dtype == np.uint8 and self.inputs.ndim == 4 else "example"

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Return these examples as the run's, and how many could not be read and are left out.

        Raises:
            UsageError: the examples are not what the run has.
        """
        inputs, targets = self.inputs[indices], self.targets[indices]
        if spec.is_pictures and self.noun == "image" and not spec.targets.shape[1:]:
            inputs = fit(inputs, spec.inputs.shape)
        shard = Shard(as_wanted("inputs", inputs, spec.inputs), as_wanted("targets", targets, spec.targets))
        on_read(len(indices), len(indices))
        return shard, 0

    def check_some(self) -> None:
        """Do nothing: all examples have been read."""


def fit(images: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
    """Bring uint8 [N, C, H, W] into `image_shape`.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); resizing is bilinear with antialiasing.

    Raises:
        UsageError: these channels cannot be turned into those.
    """
    if images.shape[1:] == image_shape:
        return np.ascontiguousarray(images)
    from torchvision.transforms.v2 import functional

    channels, *size = image_shape
    tensor = torch.from_numpy(images)
    if (tensor.shape[1], channels) == (3, 1):
        tensor = functional.rgb_to_grayscale(tensor)
    if list(tensor.shape[2:]) != size:
        tensor = functional.resize(tensor, size, antialias=True)
    if (tensor.shape[1], channels) == (1, 3):
        tensor = tensor.expand(-1, 3, -1, -1)
    if tensor.shape[1] != channels:
        raise UsageError(
            f"the data has images of {tensor.shape[1]} channels, and the run wants {channels}:"
            " set image_shape in the server's [run] table"
        )
    return np.ascontiguousarray(tensor.numpy())


def in_memory(train: Arrays, test: Arrays | None = None) -> Source:
    """Return the source of arrays."""
    return Source(ArraySplit(*train), ArraySplit(*test) if test else None)


def is_held_out(ranks: np.ndarray, fraction: float) -> np.ndarray:
    """Return about which `fraction` of N things are held out, bool [N], each by a number of its own.

    Where there are so few that chance would leave either part empty, one goes there until there are more.

    Args:
        ranks: uint64 [N], spread evenly, N of at least 2.
    """
    found = ranks < fraction * 2.0**64
    found[ranks.argmin()] = True
    if found.all():
        found[ranks.argmax()] = False
    return found
