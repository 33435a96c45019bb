"""What a model says of images, and how well: evaluation mode, float32, no gradients.

Shapes: B images of a batch, N of a data set, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.agent_progress import OnExamples, ignore_examples
from common.batches import DeviceData
from common.config import DatasetSpec

# Fetching logits waits for the device, so those of so many batches are fetched at once.
NUM_FETCHED = 16


class Evaluation(NamedTuple):
    """The quality of a model on a data set."""

    # The accuracy, 0 to 1.
    accuracy: float
    # The mean cross-entropy, in nats.
    loss: float
    num_examples: int
    # Whether each example is right: bool [N], on the CPU.
    correct: Tensor


def evaluate(
    model: nn.Module,
    images: Tensor | DeviceData,
    labels: Tensor,
    *,
    spec: DatasetSpec,
    device: torch.device,
    batch_size: int = 512,
    on_examples: OnExamples = ignore_examples,
) -> Evaluation:
    """Measure the model in evaluation mode and float32; it is left on `device`, in the mode it was in.

    Args:
        images: uint8 [N, C, H, W], N of at least 1; as `DeviceData`, they are not moved to the device again.
        labels: int64 [N].
        on_examples: called now and then with how many examples are done, and with N.
    """
    logits_NK = predict(
        model, images, spec=spec, device=device, batch_size=batch_size, on_examples=on_examples
    )
    labels = labels.cpu()
    correct_N = logits_NK.argmax(1) == labels
    return Evaluation(
        accuracy=int(correct_N.sum()) / len(labels),
        loss=F.cross_entropy(logits_NK, labels, reduction="none").double().mean().item(),
        num_examples=len(labels),
        correct=correct_N,
    )


# This is not inference_mode, whose tensors cannot be trained with afterwards.
@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor | DeviceData,
    *,
    spec: DatasetSpec,
    device: torch.device,
    batch_size: int = 512,
    on_examples: OnExamples = ignore_examples,
) -> Tensor:
    """Return the logits, float32 [N, K] on the CPU, in evaluation mode; the model is left as by `evaluate`.

    Args:
        images: as in `evaluate`.
        on_examples: as in `evaluate`.
    """
    data = _moved(images, spec, device)
    memory_format = place(model, device)
    logits: list[Tensor] = []
    waiting: list[Tensor] = []
    parts = [slice(begin, begin + batch_size) for begin in range(0, len(data), batch_size)]
    with _evaluation_mode(model), closing(data.rows(parts)) as batches:
        for number, (some,) in enumerate(batches, 1):
            x_BCHW = data.normalise(some)
            outputs = model(x_BCHW.contiguous(memory_format=memory_format))
            waiting.append(main_output(outputs).float())
            if number % NUM_FETCHED == 0 or number == len(parts):
                logits.append(torch.cat(waiting).cpu())
                waiting.clear()
                on_examples(min(number * batch_size, len(data)), len(data))
    return torch.cat(logits)


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    images: Tensor | DeviceData,
    *,
    spec: DatasetSpec,
    device: torch.device,
    seed: int,
    batch_size: int = 512,
) -> None:
    """Set BatchNorm's running statistics to their mean over the batches of one pass, in float32.

    An average of weights has other activations than the models that were averaged, and an average of
    their statistics does not fit them: this is the step that REPAIR calls reset (arXiv 2211.08403).
    Nothing happens to a model without such statistics, or with fewer than two images. The model is
    left on `device`, in the mode it was in.

    Args:
        images: uint8 [N, C, H, W]; as `DeviceData`, they are not moved to the device again.
        seed: of the batches. They mix images from everywhere: in the order of the agents, each batch
            would miss the variance that is between agents.
        batch_size: at most, where it is 3 or more.
    """
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    if not norms or len(images) < 2:
        return
    data = _moved(images, spec, device)
    memory_format = place(model, device)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.home)
    # Of nearly equal size: each batch counts alike in the mean. One image alone may have no variance.
    num_batches = min(math.ceil(len(data) / batch_size), len(data) // 2)
    parts = order.tensor_split(num_batches)
    with _evaluation_mode(model), _cumulative_mean(norms), closing(data.rows(parts)) as batches:
        for (some,) in batches:
            model(data.normalise(some).contiguous(memory_format=memory_format))


def main_output(outputs: Any) -> Any:
    """Return the logits among the outputs of a model, which may have auxiliary outputs besides.

    They are the first item of a tuple or list, and of a mapping the item "out" (torchvision's segmentation
    models call it so) or "logits" (transformers'), or else the first.
    """
    if isinstance(outputs, Mapping):
        name = next((name for name in ("out", "logits") if name in outputs), next(iter(outputs), None))
        return outputs[name] if name is not None else outputs
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def place(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Move the model, and lay it out the way convolutions are fastest: channels last, on CPUs also."""
    has_convolutions = any(parameter.dim() == 4 for parameter in model.parameters())
    memory_format = torch.channels_last if has_convolutions else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)
    return memory_format


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


def _moved(images: Tensor | DeviceData, spec: DatasetSpec, device: torch.device) -> DeviceData:
    """Return the images on the device."""
    return images if isinstance(images, DeviceData) else DeviceData(images, spec, device)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return all layers of the model that normalise over a batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
