"""Pictures in files, each with a target that is known before the file is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import Background, RunConfig
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import UsageError
from ecavg.common.shards import Shard
from ecavg.edge_agent.arrays import as_wanted
from ecavg.edge_agent.pictures import MODES, decode_image, quiet_pillow
from ecavg.edge_agent.reading import MAX_NAMED, Failure, check_some, leave_out, read_each

# A few pictures are brought to this shape to see that they can be read, where the run's is not known.
SAMPLE_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class FileSplit:
    """The train or the test part of pictures in files."""

    paths: Sequence[Path]
    # The targets, [N, …]; labels are int64 [N], -1 where the class is not known.
    targets: np.ndarray
    # The names of the labels, label 0 first; none where the targets are no labels.
    class_names: Sequence[str]
    background: Background = "white"
    # The largest fraction of the files that may be left out because they cannot be read.
    max_skipped: float = 1.0

    noun: ClassVar = "image"
    is_series: ClassVar = False

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Decode these files; files that cannot be read are left out, counted, and logged once.

        Raises:
            UsageError: too many files cannot be read, or the targets are not what the run has.
        """
        image_shape = spec.inputs.shape
        targets = as_wanted("targets", self.targets[indices], spec.targets)
        images = np.empty((len(indices), *image_shape), np.uint8)

        def decode(n: int, path: Path) -> None:
            images[n] = decode_image(path, image_shape, self.background)

        with quiet_pillow():
            failures = read_each([self.paths[n] for n in indices], decode, on_read)
        shard = Shard(images, targets)
        return leave_out_unread(shard, failures, self.max_skipped, self.class_names), len(failures)

    def check_some(self) -> None:
        """Decode a few pictures; raise UsageError if one of them cannot be read."""
        with quiet_pillow():
            check_some(self.paths, lambda path: decode_image(path, SAMPLE_SHAPE, self.background))


def leave_out_unread(
    shard: Shard, failures: Sequence[Failure], max_skipped: float, class_names: Sequence[str] = ()
) -> Shard:
    """Return the examples without those whose files could not be read, which are logged once.

    Args:
        max_skipped: the largest fraction of the files that may be left out.
        class_names: the names of the labels; none where the targets are no labels.

    Raises:
        UsageError: more files than that cannot be read.
    """
    if not failures:
        return shard
    inputs, targets = shard
    are_read = leave_out(
        failures,
        len(inputs),
        max_skipped,
        "image",
        lambda are_read: {"classes_without_images": _classes_without(targets, are_read, class_names)},
    )
    return Shard(inputs[are_read], targets[are_read])


def _classes_without(targets: np.ndarray, are_read: np.ndarray, class_names: Sequence[str]) -> list[str]:
    if targets.ndim > 1 or not class_names:
        return []
    labels = np.setdiff1d(targets, targets[are_read])
    return [class_names[label] for label in labels[labels >= 0][:MAX_NAMED]]


def check_has_pictures(what: str, run: RunConfig) -> None:
    """Raise UsageError if the run's inputs are no pictures that files can give.

    Args:
        what: what the user calls the source, as in "data folder pets".
    """
    if not run.spec.is_pictures:
        raise UsageError(f"{what} has pictures, and the run other inputs: set image_shape in its [run] table")
    if run.spec.inputs.shape[0] not in MODES:
        raise UsageError(
            f"{what}: picture files give 1 or 3 channels, and the run's image_shape asks for"
            f" {run.spec.inputs.shape[0]}"
        )
