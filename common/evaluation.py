"""What a model says of examples, and how well: evaluation mode, float32, no gradients.

Shapes: B examples of a batch, N of a data set.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.batches import DeviceData
from ecavg.common.dataset import DatasetSpec
from ecavg.common.mapped import Rows, in_memory
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.sharding import is_sharded
from ecavg.common.tasks.task import ClassFigure, Task

# No score is below this one.
WORST = -1e9
# So many examples are measured at once.
BATCH_SIZE = 512
# Fetching outputs waits for the device, so those of so many batches are fetched at once.
NUM_FETCHED = 16
# The targets in a batch have no more values than this.
MAX_BATCH_VALUES = 1 << 20


class Evaluation(NamedTuple):
    """The quality of a model on a data set."""

    # The task's figure; the higher, the better.
    score: float
    # The mean loss of the examples.
    loss: float
    num_examples: int
    # The score of each example, by which models are compared: float32 [N], finite, on the CPU.
    scores: Tensor
    # The figure of each class that the data set has, by label.
    by_class: Mapping[int, ClassFigure]
    # Further figures that people read, by name.
    figures: Mapping[str, float] = {}


def evaluate(
    model: nn.Module,
    inputs: Rows | DeviceData,
    targets: Rows,
    *,
    task: Task,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    on_examples: OnExamples = ignore_examples,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure the model in evaluation mode and float32; it is left on `device`, in the mode it was in.

    Several ranks measure some of the batches each, and each rank returns what one rank alone would return.

    Args:
        inputs: [N, …], N of at least 1; as `DeviceData`, they are not moved to the device again.
        targets: [N, …].
        on_examples: called now and then with how many of this rank's examples are done, and of how many.
        ranks: the processes that measure the same model together.
    """
    mine = ranks.part(len(targets), _most_examples(task, batch_size))
    known, begin = in_memory(targets[mine]).cpu(), 0
    num_missing = _num_missing(model, -(-len(known) // _most_examples(task, batch_size)), ranks)
    measured: dict[str, list[Tensor]] = {"losses": [], "scores": [], "tallies": []}
    with closing(_outputs(model, inputs, mine, task, device, batch_size)) as outputs:
        for some in outputs:
            part = known[begin : begin + len(some)]
            measured["losses"].append(task.loss(some, part))
            measured["scores"].append(task.scores(some, part))
            measured["tallies"].append(task.tally(some, part))
            begin += len(some)
            on_examples(begin, len(known))
    _keep_up(model, inputs, num_missing, task.spec, device)
    joined = {name: torch.cat(tensors) for name, tensors in measured.items() if tensors}
    losses, scores, tallies = ranks.concatenate(joined).values()
    figure = task.figure(tallies)
    return Evaluation(
        # A figure that is not finite is the worst of all, and can be read all the same.
        score=max(figure.score, WORST) if math.isfinite(figure.score) else WORST,
        loss=losses.double().mean().item(),
        num_examples=len(targets),
        scores=scores.float().nan_to_num(nan=torch.finfo(torch.float32).min),
        by_class=figure.by_class,
        figures={name: value for name, value in figure.figures.items() if math.isfinite(value)},
    )


def predict(
    model: nn.Module,
    inputs: Rows | DeviceData,
    *,
    task: Task,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return the outputs, float32 [N, …] on the CPU, in evaluation mode; the model is left as by `evaluate`.

    Args:
        inputs: as in `evaluate`.
    """
    with closing(_outputs(model, inputs, slice(None), task, device, batch_size)) as outputs:
        return torch.cat(list(outputs))


# This is not inference_mode, whose tensors cannot be trained with afterwards.
@torch.no_grad()
def _outputs(
    model: nn.Module,
    inputs: Rows | DeviceData,
    rows: slice,
    task: Task,
    device: torch.device,
    batch_size: int,
) -> Generator[Tensor]:
    """Yield the outputs of some rows in turn, float32 on the CPU."""
    data = _moved(inputs, task.spec, device)
    memory_format = place(model, device)
    waiting: list[Tensor] = []
    most = _most_examples(task, batch_size)
    num_fetched = NUM_FETCHED if most == batch_size else 1
    begin, end, _ = rows.indices(len(data))
    parts = [slice(first, min(first + most, end)) for first in range(begin, end, most)]
    with _evaluation_mode(model), closing(data.rows(parts)) as batches:
        for number, (some,) in enumerate(batches, 1):
            outputs = model(laid_out(data.normalise(some), memory_format))
            waiting.append(task.outputs(outputs).float())
            if number % num_fetched == 0 or number == len(parts):
                yield torch.cat(waiting).cpu()
                waiting.clear()


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    inputs: Rows | DeviceData,
    *,
    spec: DatasetSpec,
    device: torch.device,
    seed: int,
    batch_size: int = BATCH_SIZE,
    ranks: Ranks = ALONE,
) -> None:
    """Set BatchNorm's running statistics to their mean over the batches of one pass, in float32.

    An average of weights has other activations than the models that were averaged, and an average of
    their statistics does not fit them: this is the step that REPAIR calls reset (arXiv 2211.08403).
    Nothing happens to a model without such statistics, or with fewer than two examples. The model is
    left on `device`, in the mode it was in.

    Args:
        inputs: [N, …]; as `DeviceData`, they are not moved to the device again.
        seed: of the batches. They mix examples from everywhere: in the order of the agents, each batch
            would miss the variance that is between agents.
        batch_size: at most, where it is 3 or more.
        ranks: the processes that do so with the same model, each with some of the batches. The result is that
            of one rank, but for rounding.
    """
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    if not norms or len(inputs) < 2:
        return
    data = _moved(inputs, spec, device)
    memory_format = place(model, device)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.home)
    # Of nearly equal size: each batch counts alike in the mean. One example alone may have no variance.
    num_batches = min(math.ceil(len(data) / batch_size), len(data) // 2)
    parts = order.tensor_split(num_batches)[ranks.part(num_batches)]
    num_missing = _num_missing(model, len(parts), ranks)
    with _evaluation_mode(model), _cumulative_mean(norms), closing(data.rows(parts)) as batches:
        for (some,) in batches:
            model(laid_out(data.normalise(some), memory_format))
    _keep_up(model, data, num_missing, spec, device)
    _share_statistics(norms, len(parts), ranks)


def _num_missing(model: nn.Module, num_batches: int, ranks: Ranks) -> int:
    """Return how many more batches than this rank another one has; 0 if the model is not sharded.

    It is found out before the first batch: within the batches, the ranks only gather parameters.
    """
    return max(ranks.gather(num_batches)) - num_batches if is_sharded(model) else 0


@torch.no_grad()
def _keep_up(
    model: nn.Module, inputs: Rows | DeviceData, num_missing: int, spec: DatasetSpec, device: torch.device
) -> None:
    """Run a sharded model as often as the ranks with more batches do: all ranks take part in each forward.

    The outputs are thrown away, and in evaluation mode nothing changes.
    """
    if not num_missing:
        return
    data = _moved(inputs, spec, device)
    with _evaluation_mode(model), closing(data.rows([slice(0, 1)] * num_missing)) as batches:
        for (some,) in batches:
            model(data.normalise(some))


def _share_statistics(norms: Sequence[_BatchNorm], num_batches: int, ranks: Ranks) -> None:
    """Set the running statistics to their mean over the batches of all ranks, of which this one had some."""
    if ranks.world_size == 1:
        return
    both = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    statistics = [statistic for statistic in both if statistic is not None]
    weighted = torch.cat([each.double().cpu() for each in statistics]) * num_batches
    total = sum(ranks.gather(num_batches))
    mean = ranks.add(weighted) / total
    parts = torch.split(mean, [len(each) for each in statistics])
    for each, part in zip(statistics, parts, strict=True):
        each.copy_(part)
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(total)


def _most_examples(task: Task, batch_size: int) -> int:
    """Return how many examples are measured at once: outputs that are pictures are not to fill the memory."""
    return min(batch_size, max(1, MAX_BATCH_VALUES // math.prod(task.spec.targets.shape)))


def place(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Move the model, and lay it out the way convolutions are fastest: channels last, on CPUs also."""
    if is_sharded(model):
        return torch.contiguous_format
    has_convolutions = any(parameter.dim() == 4 for parameter in model.parameters())
    memory_format = torch.channels_last if has_convolutions else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)
    return memory_format


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return inputs in the memory format that `place` has returned; only pictures have channels last."""
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x.contiguous()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put Dropout and BatchNorm in evaluation mode; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _cumulative_mean(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Forget the running statistics; meanwhile, they become the mean over the batches that are shown."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        # With None, each batch counts alike.
        norm.momentum = None
        # A layer reads its count in each batch. On the device each reading would wait for all work there.
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.cpu()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                count.copy_(norm.num_batches_tracked)
            norm.num_batches_tracked = count


def _moved(inputs: Rows | DeviceData, spec: DatasetSpec, device: torch.device) -> DeviceData:
    """Return the inputs on the device."""
    return inputs if isinstance(inputs, DeviceData) else DeviceData(inputs, spec, device)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return all layers of the model that normalise over a batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
