"""The only training loop of the project: the agents' pre-training and the cloud's fine-tuning.

Everything that chance decides comes from seeds derived for each epoch, so an epoch depends only on
the weights, the optimizer and its own number: whoever has those can go on from any finished epoch.

Shapes: B images of a batch, N of a data set, C channels, H height, W width.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import CHECKPOINT_SECONDS, Checkpoints, Finished, fingerprint
from common.config import DatasetSpec, TrainingConfig
from common.errors import RunError, UsageError

CROP_PADDING = 4  # pixels on each side, as usual for 32x32 images (He et al., arXiv 1512.03385, 4.2)
REPORT_SECONDS = 0.1  # reading the loss waits for the device: not at every step


class StepReport(NamedTuple):
    """How far a training is."""

    step: int  # finished, from 1 on
    num_steps: int
    loss: float  # mean over the images since the last report; of this rank's, where there are several


OnStep = Callable[[StepReport], None]


class Evaluation(NamedTuple):
    """How well a model does on a data set."""

    accuracy: float  # 0 to 1
    loss: float  # mean cross-entropy, nats
    num_examples: int
    correct: Tensor  # bool [N], on the CPU


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed of 63 bits for the stream that `parts` name: SHA-256, so streams are independent."""
    text = json.dumps([seed, *parts])  # tells 1 from "1", and ("a", "b") from ("ab",)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def select_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:1"; auto is the first GPU, or else the CPU.

    Raises:
        UsageError: no such device here.
    """
    num_gpus = torch.cuda.device_count()
    gpus = [f"cuda:{index}" for index in range(num_gpus)]
    known = {"auto": gpus[0] if gpus else "cpu", "cpu": "cpu", **({"cuda": gpus[0]} if gpus else {})}
    if name not in known and name not in gpus:
        raise UsageError(f"device {name!r} is not there: choose {', '.join([*known, *gpus])}")
    return torch.device(known.get(name, name))


def make_deterministic() -> None:
    """Let this process compute the same bits again and again; call it before the first use of a GPU.

    A few CUDA operations (such as the backward pass of VGG's adaptive pooling) have no deterministic
    form: PyTorch warns of them, and the model still trains.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling memory that is about to be written costs time, and we read none before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    *,
    spec: DatasetSpec,
    device: torch.device,
    seed: int,
    on_step: OnStep | None = None,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> float:
    """Train the model, which is left on `device`; the global random state is left as it was.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        seed: the same seed, weights and data give the same weights, bit by bit, on the CPU.
        on_step: called about ten times a second at most, and after the last step; may raise to stop.
        rank: of this process in the default process group; each takes its part of every batch.
        world_size: of that group; 1: there is none.
        checkpoint: a file that keeps the last finished epoch. If it is there, and of a training with the
            same config, spec, seed, weights and data, that one is gone on with; on the CPU it ends with
            the same bits as if it had never stopped. The caller removes it when the result is safe.
        checkpoint_seconds: least time between two checkpoints, and before the first.

    Returns:
        The mean loss of the last epoch, over all ranks; NaN when there is no epoch.

    Raises:
        UsageError: too few images, or too small batches, for this model.
        RunError: the loss is not finite any more.
    """
    if config.epochs == 0:
        return math.nan
    if checkpoint and world_size > 1:
        raise ValueError("only a training in one process can be kept in a checkpoint")
    training = _Training(model, _Data(images, labels, spec, device), config, seed, on_step, rank, world_size)
    kept = None
    if checkpoint:
        settings = (config.model_dump(mode="json"), spec, seed)
        identity = fingerprint(settings, model, images, labels)
        kept = Checkpoints(checkpoint, identity, model, training.optimizer, checkpoint_seconds)
    finished = kept.restore() if kept else Finished()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(finished.num_epochs, config.epochs):
            loss = training.run_epoch(epoch)
            if not math.isfinite(loss):
                raise RunError(
                    f"training diverged in epoch {epoch + 1}, its loss is {loss}: lower learning_rate"
                )
            finished = Finished(num_epochs=epoch + 1, loss=loss)
            if kept:
                kept.epoch_finished(finished)
    model.zero_grad()  # gives the gradients' memory back
    return finished.loss


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    spec: DatasetSpec,
    device: torch.device,
    batch_size: int = 512,
) -> Evaluation:
    """Measure the model in evaluation mode and float32; it is left on `device`, in the mode it was in.

    Args:
        images: uint8 [N, C, H, W], N of at least 1.
        labels: int64 [N].
    """
    data = _Data(images, labels, spec, device)
    memory_format = _place(model, device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for begin in range(0, len(labels), batch_size):
                x_BCHW, y_B = data.take(slice(begin, begin + batch_size))
                logits = model(x_BCHW.contiguous(memory_format=memory_format))
                loss += F.cross_entropy(logits, y_B, reduction="sum")
                correct.append(logits.argmax(1) == y_B)
    finally:
        model.train(was_training)
    correct_N = torch.cat(correct).cpu()
    return Evaluation(
        accuracy=int(correct_N.sum()) / len(correct_N),
        loss=loss.item() / len(correct_N),
        num_examples=len(correct_N),
        correct=correct_N,
    )


def random_crop(x_BCHW: Tensor, corners_B2: Tensor) -> Tensor:
    """Pad with zeros and cut the old size out again, each image from its own top left corner.

    Args:
        x_BCHW: any dtype; normalised, so that zero is the mean colour.
        corners_B2: int64, row and column, 0 to 2 * CROP_PADDING.
    """
    num_images, _, height, width = x_BCHW.shape
    padded = F.pad(x_BCHW, (CROP_PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, row, column, H, W]
    every = torch.arange(num_images, device=x_BCHW.device)
    return windows[every, :, corners_B2[:, 0], corners_B2[:, 1]]


def horizontal_flip(x_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror the images for which `flipped_B` (bool) is true."""
    return torch.where(flipped_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


def learning_rate_factor(schedule: str, step: int, num_steps: int) -> float:
    """What the learning rate is multiplied with at `step`, from 0 on: 1 at most, 0 after the last step.

    "cosine" is SGDR's half wave (arXiv 1608.03983, eq. 5); "one-cycle" rises linearly over the first
    quarter and falls linearly from there (arXiv 1708.07120).
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / num_steps))
    if schedule == "one-cycle":
        num_rising = math.ceil(num_steps / 4)
        return min((step + 1) / num_rising, (num_steps - step) / (num_steps - num_rising + 1))
    return 1.0


def batch_bounds(num_images: int, batch_size: int, smallest: int) -> list[tuple[int, int]]:
    """Begin and end of each batch; a last one of fewer than `smallest` images joins the one before.

    Raises:
        UsageError: no batch, or none but too small ones, can be made.
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


class _Data:
    """Images and labels, on the device where they fit; taken out as normalised float32."""

    def __init__(self, images: Tensor, labels: Tensor, spec: DatasetSpec, device: torch.device) -> None:
        if images.dtype != torch.uint8 or labels.dtype != torch.int64 or len(images) != len(labels):
            raise ValueError(f"{len(images)} {images.dtype} images, {len(labels)} {labels.dtype} labels")
        self.device = device
        self._images = images.to(device) if _fits(images, device) else images
        self._labels = labels.to(self._images.device)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        self._scale = (1 / (255 * std)).to(device)
        self._shift = (-mean / std).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, which: Tensor | slice) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W], normalised, and y [B], both on the device."""
        if isinstance(which, Tensor):
            which = which.to(self._images.device)
        images, labels = self._images[which], self._labels[which]
        if images.device != self.device:
            images = images.pin_memory().to(self.device, non_blocking=True)
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return torch.addcmul(self._shift, images.float(), self._scale), labels


class _Chance(NamedTuple):
    """All that chance decides about one epoch's data; drawn on the CPU, so every device and rank agrees."""

    order_N: Tensor  # int64, a permutation
    corners_N2: Tensor  # int64, for random_crop
    flipped_N: Tensor  # bool, for horizontal_flip

    @classmethod
    def draw(cls, num_images: int, seed: int, device: torch.device) -> "_Chance":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(num_images, generator=generator)
        corners = torch.randint(2 * CROP_PADDING + 1, (num_images, 2), generator=generator)
        flipped = torch.rand(num_images, generator=generator) < 0.5
        return cls(order.to(device), corners.to(device), flipped.to(device))


class _Reports:
    """Passes the loss on to `on_step`, now and then: reading it waits for the device."""

    def __init__(self, on_step: OnStep | None, num_steps: int) -> None:
        self._on_step = on_step
        self._num_steps = num_steps
        self._losses: list[Tensor] = []
        self._num_images = 0
        self._due = 0.0

    def add(self, step: int, loss_sum: Tensor, num_images: int) -> None:
        if self._on_step is None:
            return
        self._losses.append(loss_sum)
        self._num_images += num_images
        if time.monotonic() < self._due and step < self._num_steps:
            return
        loss = torch.stack(self._losses).sum().item() / self._num_images
        self._losses, self._num_images = [], 0
        self._on_step(StepReport(step, self._num_steps, loss))
        self._due = time.monotonic() + REPORT_SECONDS


class _Training:
    """A training under way; `run_epoch` is called for each epoch in turn."""

    def __init__(
        self,
        model: nn.Module,
        data: _Data,
        config: TrainingConfig,
        seed: int,
        on_step: OnStep | None,
        rank: int,
        world_size: int,
    ) -> None:
        self._data, self._config, self._seed = data, config, seed
        self._rank, self._world_size = rank, world_size
        smallest = world_size * (2 if _has_batch_norm(model) else 1)
        self._batches = batch_bounds(len(data), config.batch_size, smallest)
        self._num_steps = config.epochs * len(self._batches)
        self._reports = _Reports(on_step, self._num_steps)
        self._memory_format = _place(model, data.device)
        self.optimizer = _make_optimizer(model, config)
        self._model = model.train()
        if world_size > 1:
            device_ids = [data.device] if data.device.type == "cuda" else None
            self._model = DistributedDataParallel(model, device_ids)

    def run_epoch(self, epoch: int) -> float:
        """One pass over the data, epochs counted from 0; its mean loss over all ranks."""
        torch.manual_seed(derive_seed(self._seed, "layers", epoch, self._rank))  # dropout and the like
        chance = _Chance.draw(len(self._data), derive_seed(self._seed, "data", epoch), self._data.device)
        total = torch.zeros((), dtype=torch.float64, device=self._data.device)
        for index, (begin, end) in enumerate(self._batches):
            step = epoch * len(self._batches) + index
            mine = self._my_part(begin, end)
            loss_sum = self._step(step, chance, mine, end - begin)
            total += loss_sum
            self._reports.add(step + 1, loss_sum, mine.stop - mine.start)
        if self._world_size > 1:
            dist.all_reduce(total)
        return total.item() / len(self._data)

    def _my_part(self, begin: int, end: int) -> slice:
        size, rank, ranks = end - begin, self._rank, self._world_size
        return slice(begin + size * rank // ranks, begin + size * (rank + 1) // ranks)

    def _step(self, step: int, chance: _Chance, mine: slice, batch_size: int) -> Tensor:
        """One step of the optimizer; the sum of the loss over this rank's part of the batch."""
        factor = learning_rate_factor(self._config.schedule, step, self._num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate * factor
        x_BCHW, y_B = self._batch(chance, mine)
        with _autocast(self._data.device):
            loss_sum = F.cross_entropy(
                self._model(x_BCHW), y_B, reduction="sum", label_smoothing=self._config.label_smoothing
            )
        self.optimizer.zero_grad()
        # DistributedDataParallel averages over ranks: times world_size it is the mean over the batch.
        (loss_sum * (self._world_size / batch_size)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss_sum.detach()

    def _batch(self, chance: _Chance, mine: slice) -> tuple[Tensor, Tensor]:
        x_BCHW, y_B = self._data.take(chance.order_N[mine])
        if "random_crop" in self._config.augment:
            x_BCHW = random_crop(x_BCHW, chance.corners_N2[mine])
        if "horizontal_flip" in self._config.augment:
            x_BCHW = horizontal_flip(x_BCHW, chance.flipped_N[mine])
        return x_BCHW.contiguous(memory_format=self._memory_format), y_B


def _place(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Move the model, and lay it out the way convolutions are fastest: channels last, on CPUs also."""
    has_convolutions = any(parameter.dim() == 4 for parameter in model.parameters())
    memory_format = torch.channels_last if has_convolutions else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)
    return memory_format


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether the images may stay on the device: half of its free memory is left for the training."""
    return device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] // 2


def _has_batch_norm(model: nn.Module) -> bool:
    """Whether a batch of one image is too small: it has no variance."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters, rate, decay = model.parameters(), config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            weight_decay=decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=True,
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay, fused=True)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on GPUs that have it in hardware; float32 elsewhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
