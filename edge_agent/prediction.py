"""What the model in use says of a few pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.tasks import kind_of
from ecavg.edge_agent.exporting import Deployed, labels_of
from ecavg.edge_agent.pictures import decode_image, quiet_pillow


class Guess(NamedTuple):
    """A class, and the probability that the model gives it, 0 to 1."""

    label: str
    probability: float


def predict(
    model: Deployed, run: RunConfig, paths: Sequence[Path], num_classes: int
) -> dict[Path, list[Guess]]:
    """Return for each picture its most probable classes, the first one first.

    Raises:
        UsageError: the model does not tell the classes of pictures, or a picture cannot be read.
    """
    if not (run.spec.is_pictures and kind_of(run.task).has_labels):
        raise UsageError(
            f"the model in use does not tell the classes of pictures: its task is {run.task!r}, its inputs"
            f" are {run.spec.inputs.dtype} {list(run.spec.inputs.shape)}; export it for your own program"
        )
    return {path: _guesses(model, run, path, num_classes) for path in paths}


def _guesses(model: Deployed, run: RunConfig, path: Path, num_classes: int) -> list[Guess]:
    image = _read(path, run)
    with torch.inference_mode():
        probabilities = model(image[None]).softmax(1)[0]
    labels = labels_of(run)
    top = probabilities.topk(min(num_classes, len(labels)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [Guess(labels[index], probability) for index, probability in pairs]


def _read(path: Path, run: RunConfig) -> torch.Tensor:
    try:
        with quiet_pillow():
            return torch.from_numpy(decode_image(path, run.spec.inputs.shape, run.background))
    # Pillow raises whatever a broken file led it to.
    except Exception as error:
        raise UsageError(f"picture {path} cannot be read ({error}): name another file") from error
