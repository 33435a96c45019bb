"""The only training loop of the project: the agents' pre-training and the cloud's fine-tuning.

Everything that chance decides comes from seeds derived for each epoch, so an epoch depends only on
the weights, the optimizer and its own number: whoever has those can go on from any finished epoch.

Shapes: B examples of a batch, N of a data set.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecavg.common.batches import DeviceData, batch_bounds, draw_epoch
from ecavg.common.checkpoint import CheckpointFile, Checkpoints, Finished, fingerprint, fingerprint_of
from ecavg.common.config import TrainingConfig
from ecavg.common.errors import DivergedError, is_out_of_memory
from ecavg.common.evaluation import batch_norms
from ecavg.common.graphs import MIN_STEPS, Recorder, ReplayedSteps, Step, recorder_for
from ecavg.common.mapped import Rows, in_memory
from ecavg.common.precision import Precision, decide, describe, has_bfloat16
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.schedule import Place, learning_rate_factor, whole
from ecavg.common.seeds import derive_seed
from ecavg.common.sharding import is_sharded
from ecavg.common.tasks.task import Task
from ecavg.common.training_step import TrainingStep

# Reading the loss waits for the device, so it is not read at every step.
REPORT_SECONDS = 0.1


class StepReport(NamedTuple):
    """The progress of a training."""

    # The finished step, from 1 on.
    step: int
    num_steps: int
    # The mean over the images since the last report; over this rank's, where there are several ranks.
    loss: float


OnStep = Callable[[StepReport], None]
AfterStep = Callable[[], None]

log = structlog.get_logger()


class Examples(NamedTuple):
    """Inputs and their targets, in memory or in files."""

    # The inputs, [N, …].
    inputs: Rows
    # The targets, [N, …].
    targets: Rows


class Recipe(NamedTuple):
    """All that decides what becomes of given weights and examples."""

    config: TrainingConfig
    task: Task
    seed: int
    # What the training computes in. `config.precision` is what was asked for: see `choose_precision`.
    precision: Precision
    # Each epoch of N examples is made by `batches.balanced_order`, instead of showing each example once.
    class_balanced: bool = False
    # The place in the schedule of the run; None: the training has a schedule of its own.
    place: Place | None = None


def choose_precision(
    model: nn.Module,
    examples: Examples,
    config: TrainingConfig,
    *,
    task: Task,
    device: torch.device,
    kept_at: Path | None = None,
) -> Precision:
    """Return what the training shall compute in; `config.precision` may leave it open.

    Left open, the precision is bfloat16 on GPUs that have it. On CPUs steps with copies of the model are
    timed, once; the global random state is left as it was.

    Args:
        model: what shall be trained; it is not changed.
        kept_at: the file that keeps what was found out about this CPU, for as long as the same training may
            be done again; None: the precision is float32 on CPUs. Ranks that train together would have to
            agree, so they give None.

    Raises:
        UsageError: steps are timed, and there are too few images, or too small batches, for this model.
    """
    if config.precision != "auto":
        return config.precision
    if not has_bfloat16(device):
        return "float32"
    if is_sharded(model):
        # It cannot be copied, so nothing is tried or timed.
        return "bfloat16" if device.type == "cuda" else "float32"
    if not len(examples.targets):
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if can_train_in_bfloat16(model, examples, config, task, device) else "float32"
    if kept_at is None:
        return "float32"
    data = DeviceData(examples.inputs, task.spec, device, [examples.targets])
    batch_size = min(len(data), config.batch_size)
    subject = describe(model, data.input_shape, batch_size)
    num_steps = config.epochs * math.ceil(len(data) / batch_size)
    # A model that cannot be copied, such as TorchScript's, is not timed.
    with torch.random.fork_rng(devices=[]), suppress(_NoCopyError):
        return decide(kept_at, subject, num_steps, partial(_rehearsal, model, data, config, task))
    return "float32"


def can_train_in_bfloat16(
    model: nn.Module, examples: Examples, config: TrainingConfig, task: Task, device: torch.device
) -> bool:
    """Return True if a training step with a few of the examples works in bfloat16; the model is not changed.

    Some operations, such as Fourier transforms, have no bfloat16. A model that cannot be copied is not tried.

    Raises:
        RuntimeError: there is not enough memory.
    """
    data = DeviceData(examples.inputs[:2], task.spec, device, [examples.targets[:2]])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            _rehearsal(model, data, config, task, "bfloat16")()
        except (RuntimeError, _NoCopyError) as error:
            if is_out_of_memory(error):
                # This says nothing of bfloat16, and with memory the training would have other bits.
                raise
            log.warning("bfloat16_failed", reason=str(error).partition("\n")[0])
            return False
    return True


class _NoCopyError(Exception):
    """A model cannot be copied."""


def _rehearsal(
    model: nn.Module, data: DeviceData, config: TrainingConfig, task: Task, precision: Precision
) -> Callable[[], object]:
    """Return a step with a copy of the model, which can be taken again and again."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        # The model is the user's, and what refuses to be copied raises whatever it likes.
        raise _NoCopyError(str(error)) from error
    if not all(parameter.is_leaf for parameter in copied.parameters()):
        raise _NoCopyError("the parameters of its copy cannot be trained, as with TorchScript")
    recipe = Recipe(config.model_copy(update={"graphs": "off"}), task, seed=0, precision=precision)
    return _Training(copied, data, recipe, None, ALONE).rehearsal()


def train(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    *,
    device: torch.device,
    on_step: OnStep | None = None,
    after_step: AfterStep = lambda: None,
    ranks: Ranks = ALONE,
    checkpoint: CheckpointFile | None = None,
) -> float:
    """Train the model, which is left on `device`; the global random state is left as it was.

    The same recipe, weights and examples give the same weights, bit by bit, on the CPU.

    Args:
        on_step: called about ten times a second at most, and after the last step; may raise to stop.
        after_step: called after every step, when the parameters have changed; must not change them. It is
            not called again for the steps that a checkpoint has.
        ranks: the processes that train together; each takes its part of every batch.
        checkpoint: keeps the last finished epoch. If the file is there, and of a training with the same
            recipe, weights and examples, that training is gone on with; on the CPU it ends with the same
            bits as if it had never stopped. The caller removes the file when the result is safe. Ranks go
            on with the latest file of all machines, whatever the number of ranks that wrote it.

    Returns:
        The mean loss of the last epoch, over all ranks; NaN when there is no epoch.

    Raises:
        UsageError: too few images, or too small batches, for this model.
        DivergedError: the loss is not finite any more.
    """
    num_epochs = recipe.config.epochs
    if num_epochs == 0:
        return math.nan
    data = DeviceData(examples.inputs, recipe.task.spec, device, [examples.targets])
    balanced = in_memory(examples.targets).cpu() if recipe.class_balanced else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        training = _Training(model, data, recipe, on_step, ranks, balanced, after_step)
        kept = training.checkpoints(checkpoint, recipe, examples) if checkpoint else None
        finished = kept.restore() if kept else Finished()
        for epoch in range(finished.num_epochs, num_epochs):
            loss = training.run_epoch(epoch)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"training diverged in epoch {epoch + 1}, its loss is {loss}: lower learning_rate"
                )
            finished = Finished(num_epochs=epoch + 1, loss=loss)
            if kept:
                kept.epoch_finished(finished)
    # The gradients' memory is given back.
    model.zero_grad()
    return finished.loss


class _Reports:
    """The losses on their way to `on_step`, now and then: reading a loss waits for the device.

    Args:
        loss_sum: the sum of the loss over the examples since the last report, on the device.
    """

    def __init__(self, on_step: OnStep | None, num_steps: int, loss_sum: Tensor) -> None:
        self._on_step = on_step
        self._num_steps = num_steps
        self._loss_sum = loss_sum
        self._num_images = 0
        self._due = 0.0

    def add(self, step: int, num_images: int) -> None:
        """Count a finished step with so many images, and report if it is time."""
        if self._on_step is None:
            return
        self._num_images += num_images
        if time.monotonic() < self._due and step < self._num_steps:
            return
        loss = self._loss_sum.item() / self._num_images
        self._loss_sum.zero_()
        self._num_images = 0
        self._on_step(StepReport(step, self._num_steps, loss))
        self._due = time.monotonic() + REPORT_SECONDS


class _Training:
    """A training under way; `run_epoch` is called for each epoch in turn."""

    def __init__(
        self,
        model: nn.Module,
        data: DeviceData,
        recipe: Recipe,
        on_step: OnStep | None,
        ranks: Ranks,
        # The labels by which to balance; None: each example is shown once.
        balanced_N: Tensor | None = None,
        after_step: AfterStep = lambda: None,
    ) -> None:
        self._model, self._ranks = model, ranks
        self._data, self._balanced_N = data, balanced_N
        self._config, self._seed = recipe.config, recipe.seed
        self._place = recipe.place or whole(recipe.config)
        # One example alone may have no variance.
        smallest = ranks.world_size * (2 if batch_norms(model) else 1)
        self._batches = batch_bounds(len(data), self._config.batch_size, smallest)
        self._num_steps = self._config.epochs * len(self._batches)
        self._step = TrainingStep(
            model,
            data,
            self._config,
            task=recipe.task,
            precision=recipe.precision,
            world_size=ranks.world_size,
        )
        self._reports = _Reports(on_step, self._num_steps, self._step.reported_loss)
        self._after_step = after_step
        # The size of all batches but the last.
        self._full_size = self._batches[0][1]
        self._take_full: Step = partial(self._step.take, batch_size=self._full_size)
        if recorder := self._recorder():
            changed, device = self._step.changed_tensors, data.device
            self._take_full = ReplayedSteps(self._take_full, model, changed, recorder, device).take

    def checkpoints(self, file: CheckpointFile, recipe: Recipe, examples: Examples) -> Checkpoints:
        """Return the checkpoints of this training, which has not begun; every rank asks for them."""
        identity = _identity(recipe, self._model, examples, file.subject)
        return Checkpoints(file, identity, self._model, self._step.optimizer, self._ranks)

    def rehearsal(self) -> Callable[[], object]:
        """Return a step that can be taken again and again, to see how long it takes."""
        draws = draw_epoch(len(self._data), self._seed)
        (batch,) = draws.batches(self._data, [slice(0, self._full_size)])
        self._set_learning_rate(0)
        return lambda: self._step.take(batch, self._full_size)

    def run_epoch(self, epoch: int) -> float:
        """Make one pass over the data, epochs counted from 0; return its mean loss over all ranks."""
        # Dropout and the like draw from this stream.
        torch.manual_seed(derive_seed(self._seed, "layers", epoch, self._ranks.rank))
        draws = draw_epoch(len(self._data), derive_seed(self._seed, "data", epoch), self._balanced_N)
        total = self._step.epoch_loss.zero_()
        parts = [self._my_part(begin, end) for begin, end in self._batches]
        with closing(draws.batches(self._data, parts)) as batches:
            for index, (batch, (begin, end)) in enumerate(zip(batches, self._batches, strict=True)):
                step = epoch * len(self._batches) + index
                self._set_learning_rate(step)
                if end - begin == self._full_size:
                    self._take_full(batch)
                else:
                    self._step.take(batch, end - begin)
                self._after_step()
                self._reports.add(step + 1, len(batch.targets))
        if self._ranks.world_size > 1:
            dist.all_reduce(total)
        return total.item() / len(self._data)

    def _recorder(self) -> Recorder | None:
        """Return what records the step with a full batch; None: it is always taken as usual."""
        recorder = recorder_for(self._data.device)
        if recorder is None or self._config.graphs == "off":
            return None
        num_full = self._config.epochs * sum(end - begin == self._full_size for begin, end in self._batches)
        reason = ""
        if self._ranks.world_size > 1:
            reason = "several GPUs train together"
        elif not self._step.is_fused:
            reason = "not all parameters are floating-point numbers"
        if reason:
            log.info("graph_not_used", reason=reason)
        elif num_full < MIN_STEPS:
            reason = f"too few full batches to record one: {num_full} of at least {MIN_STEPS}"
            log.debug("graph_not_used", reason=reason)
        return None if reason else recorder

    def _set_learning_rate(self, step: int) -> None:
        factor = learning_rate_factor(self._config.schedule, self._place, step, len(self._batches))
        self._step.set_learning_rate(self._config.learning_rate * factor)

    def _my_part(self, begin: int, end: int) -> slice:
        size, rank, ranks = end - begin, self._ranks.rank, self._ranks.world_size
        return slice(begin + size * rank // ranks, begin + size * (rank + 1) // ranks)


def _identity(recipe: Recipe, model: nn.Module, examples: Examples, subject: str) -> str:
    """Return the fingerprint of a training, by which its checkpoint is known.

    Args:
        subject: what names the weights and the examples; empty: their digest does.
    """
    # With graphs and without, a training is the same.
    config = recipe.config.model_dump(mode="json", exclude={"graphs"})
    place = recipe.place or whole(recipe.config)
    task = recipe.task
    settings: list[Any] = [config, recipe.precision, type(task).__qualname__, task.spec, recipe.seed, place]
    if recipe.class_balanced:
        settings.append("balanced")
    return (
        fingerprint_of(settings, subject)
        if subject
        else fingerprint(settings, model, *map(in_memory, examples))
    )
