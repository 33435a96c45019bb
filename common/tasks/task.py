"""The base of all tasks: what training and measuring ask of one.

Shapes: B examples of a batch, N of a data set.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ecavg.common.config import RunConfig
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import UsageError
from ecavg.common.factories import import_factory
from ecavg.common.tasks import is_own, kind_of


class ClassFigure(NamedTuple):
    """How well a model does on one class."""

    num_examples: int
    score: float


class Figure(NamedTuple):
    """How well a model does on a data set."""

    # What people read, and models are chosen by: the higher, the better.
    score: float
    # The same for each class that the data set has, by label; empty where there are no classes.
    by_class: Mapping[int, ClassFigure] = {}
    # Further figures that people read, by name.
    figures: Mapping[str, float] = {}


class Task:
    """What a model learns. An own task derives from this class, and has what raises NotImplementedError here.

    All outputs are float32, as `outputs` returns them.

    Attributes:
        metric: the name of the figure.
        spec: the inputs and targets of the run.
    """

    metric: ClassVar[str] = "score"

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec

    def outputs(self, of_model: Any) -> Any:
        """Return the output of a model that counts, [B, …]; see `main_output`."""
        return main_output(of_model)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the outputs in the unit of the targets, [B, …]."""
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each example, float32 [B]."""
        raise NotImplementedError

    def loss_sum(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the sum of the losses, float32 []: what a training step goes by."""
        return self.loss(outputs, targets, label_smoothing).sum()

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a score of each example, float32 [B], by which two models are compared: higher is better."""
        raise NotImplementedError

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each example what the figure is computed from, [B, …]: its score, if nothing else is."""
        return self.scores(outputs, targets)

    def figure(self, tally: Tensor) -> Figure:
        """Return the figure of a data set from the tally of its examples, [N, …], N of at least 1."""
        return Figure(tally.double().mean().item())


def main_output(outputs: Any) -> Any:
    """Return the main one of a model's outputs; a model may have auxiliary outputs besides.

    It is the first item of a tuple or list, and of a mapping the item "out" (torchvision's segmentation
    models call it so) or "logits" (transformers'), or else the first.
    """
    if isinstance(outputs, Mapping):
        name = next((name for name in ("out", "logits") if name in outputs), next(iter(outputs), None))
        return outputs[name] if name is not None else outputs
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def task_of(run: RunConfig, allowed_factories: Collection[str] | None = None) -> Task:
    """Return the run's task.

    Args:
        allowed_factories: the user's own code that may be imported; None allows any.

    Raises:
        UsageError: the task is not allowed here, cannot be imported, or is no `Task`.
    """
    name = run.task
    if not is_own(name):
        name = f"ecavg.common.tasks.{name.replace('-', '_')}:{name.title().replace('-', '')}"
        allowed_factories = None
    made: Any = import_factory(name, allowed_factories)
    try:
        task = made(run.spec)
    # The class may be the user's code, which may raise any error.
    except Exception as error:
        raise UsageError(f"the task {run.task!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise UsageError(f"the task {run.task!r} does not derive from common.tasks.task.Task")
    return task


def output_shape_of(run: RunConfig) -> tuple[int, ...] | None:
    """Return the shape of a model's output for one example; None: an own task alone knows."""
    shape_of = kind_of(run.task).output_shape
    return shape_of(run.spec) if shape_of else None
