"""What a model learns: the tasks of `run.task`, and what everybody must know of each.

What a task computes is a `Task` (common/tasks/task.py), in a file of its own, which needs PyTorch. This
module does not, so that the configuration and the serving process can know of tasks. An own task has the
name `"package.module:Task"`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ecavg.common.dataset import DatasetSpec, Targets, labels

Shape = tuple[int, ...]

OWN_METRIC = "score"
# The class of pixels that do not count.
IGNORED = -1


class Kind(NamedTuple):
    """What is known of a task without its code."""

    # The name of the figure that people read; the higher, the better.
    metric: str
    # The first part of the names under which the figure is published, as in `accuracy_before`.
    field: Literal["accuracy", "score"] = "score"
    # No figure is below `lowest` or above `highest`.
    lowest: float = 0.0
    highest: float = 1.0
    # The targets by the shape of the inputs and the number of classes; None: they are numbers, or an own
    # task's, and `[run.targets]` describes them.
    targets: Callable[[Shape, int], Targets] | None = None
    # The shape of a model's output for one example; None: the task alone knows.
    output_shape: Callable[[DatasetSpec], Shape] | None = None
    # Whether there is one class an example, by which examples can be dealt out and balanced.
    has_labels: bool = False
    # Whether `label_smoothing` means something.
    can_smooth: bool = True
    # Whether the audit can compare labels and predictions.
    is_audited: bool = False


def _segmentation_targets(shape: Shape, num_classes: int) -> Targets:
    return Targets("int64", shape[1:], IGNORED, num_classes - 1)


KINDS: Mapping[str, Kind] = {
    "classification": Kind(
        "accuracy",
        field="accuracy",
        targets=lambda _, num_classes: labels(num_classes),
        output_shape=lambda spec: (spec.num_classes,),
        has_labels=True,
        is_audited=True,
    ),
    "multi-label": Kind(
        "mean average precision",
        targets=lambda _, num_classes: Targets("int64", (num_classes,), 0, 1),
        output_shape=lambda spec: (spec.num_classes,),
    ),
    "regression": Kind(
        "R²", lowest=float("-inf"), output_shape=lambda spec: spec.targets.shape, can_smooth=False
    ),
    "segmentation": Kind(
        "mean intersection over union",
        targets=_segmentation_targets,
        output_shape=lambda spec: (spec.num_classes, *spec.targets.shape),
    ),
}
_OWN = Kind(OWN_METRIC, lowest=float("-inf"), highest=float("inf"))


def is_own(task: str) -> bool:
    """Return True if the task is code of the user's."""
    return ":" in task


def kind_of(task: str) -> Kind:
    """Return what is known of the task with this name."""
    return _OWN if is_own(task) else KINDS[task]


def published(kind: Kind, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields like `score_before` under the names that a task publishes, as `accuracy_before`."""
    return {name.replace("score_", f"{kind.field}_", 1): value for name, value in fields.items()}


def unpublished(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return published fields under the names that they have in here: what `published` does, undone."""
    return {re.sub(r"^accuracy(?=_|$)", "score", name): value for name, value in fields.items()}
