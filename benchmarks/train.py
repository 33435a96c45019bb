"""The speed of our training loop in images a second, compared with a bare loop and the usual loop.

    python -m benchmarks.train --models mlp mobilenet_v2 resnet50 --device cpu

The bare loop has float32 images in memory, normalised once, in a new order in each epoch. It trains the model
as torchvision makes it with cross-entropy and SGD, in the same precision as our loop. It reports and augments
nothing. Our loop is compared with it on the same model, data and optimizer, without augmentation.
The usual loop has a DataLoader with one worker for each core, which makes PIL images and applies RandomCrop,
RandomHorizontalFlip, ToTensor and Normalize of torchvision, in float32. For the comparison with it, our loop
crops and flips, too. The loops take turns, and each run of ours is compared with the run next to it.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import figures
from common.config import DATASETS, DatasetSpec, RunConfig, TrainingConfig
from common.models import build_model
from common.training import Examples, Recipe, choose_precision, select_device, train

SEED = 0


class Workload(NamedTuple):
    """The dataset whose image size a model takes, the batch size, and the default number of images."""

    dataset: str
    batch_size: int
    # The default number of images on a CPU.
    num_images: int
    num_images_gpu: int


WORKLOADS = {
    "mlp": Workload("mnist", 64, 40_000, 400_000),
    "mobilenet_v2": Workload("cifar10", 128, 768, 25_000),
    "resnet50": Workload("cifar100", 128, 256, 25_000),
}
# The presets of these models augment their images.
AUGMENTED = {"mobilenet_v2", "resnet50"}


class Case(NamedTuple):
    """The model and the data on which the loops are compared."""

    # Each loop trains a copy of the model.
    model: nn.Module
    # uint8 [N, C, H, W]
    images: Tensor
    # int64 [N]
    labels: Tensor
    spec: DatasetSpec
    config: TrainingConfig
    device: torch.device


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    device = set_up(arguments)
    machine = figures.machine()
    measured = {
        name: _measure(_case(name, device, arguments), arguments.repeats) for name in arguments.models
    }
    result = {
        "benchmark": "train",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "models": measured,
        "machine": machine,
    }
    rows = [
        (name, each["images_per_second"]["ours"]["median"], each["of_bare"], each["of_usual"])
        for name, each in measured.items()
    ]
    headings = ("", "ours, images/s", "speed, of bare", "speed, of usual")
    figures.emit(result, f"training on {result['device']}", headings, rows)
    return 0


def set_up(arguments: argparse.Namespace) -> torch.device:
    """Set PyTorch's number of threads as `--threads` says, and return the device that `--device` names."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return select_device(arguments.device)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=tuple(WORKLOADS), help="which")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    precisions = ("float32", "bfloat16")
    parser.add_argument(
        "--precision", choices=precisions, default="float32", help="of ours and the bare loop"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--images", type=int, metavar="N", help="of an epoch (default: by model and device)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="of each training")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="trainings in each way")
    return parser.parse_args(argv)


def _case(name: str, device: torch.device, arguments: argparse.Namespace) -> Case:
    workload = WORKLOADS[name]
    num_images = arguments.images or (
        workload.num_images_gpu if device.type == "cuda" else workload.num_images
    )
    run = RunConfig(model=name, dataset=workload.dataset, small_images=name in AUGMENTED)
    generator = torch.Generator().manual_seed(SEED)
    shape = (num_images, *run.spec.image_shape)
    return Case(
        model=build_model(run, seed=SEED),
        images=torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        labels=torch.randint(run.spec.num_classes, (num_images,), generator=generator),
        spec=DATASETS[workload.dataset],
        config=TrainingConfig(
            epochs=arguments.epochs,
            batch_size=workload.batch_size,
            learning_rate=0.01,
            schedule="constant",
            precision=arguments.precision,
        ),
        device=device,
    )


def _measure(case: Case, repeats: int) -> dict[str, Any]:
    """Run the four loops in turn; compare our augmented loop with the usual loop, which augments, too."""
    augmented = case._replace(
        config=case.config.model_copy(update={"augment": ("random_crop", "horizontal_flip")})
    )
    loops: dict[str, Callable[[], object]] = {
        "ours": lambda: _train_ours(case),
        "bare": lambda: _train_bare(case),
        "ours_augmented": lambda: _train_ours(augmented),
        "usual": lambda: _train_usual(case),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in loops}
    for index in range(repeats + 1):
        for name, loop in loops.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            loop()
            _wait_for(case.device)
            # The first training of each loop is a warm-up.
            if index:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
    num_images = len(case.images) * case.config.epochs
    return {
        "images": num_images,
        "batch_size": case.config.batch_size,
        "images_per_second": {
            name: figures.spread([num_images / each for each in taken]) for name, taken in seconds.items()
        },
        "of_bare": figures.ratios(seconds["bare"], seconds["ours"]),
        # The processor time of this process lacks the time of the usual loop's workers, so there is no such
        # figure for the usual loop. With one thread, the figure equals the ratio on an idle machine.
        "of_bare_cpu": figures.ratios(cpu_seconds["bare"], cpu_seconds["ours"]),
        "of_usual": figures.ratios(seconds["usual"], seconds["ours_augmented"]),
    }


def _train_ours(case: Case) -> None:
    examples = Examples(case.images, case.labels)
    precision = choose_precision(case.model, examples, case.config, spec=case.spec, device=case.device)
    recipe = Recipe(case.config, case.spec, SEED, precision)
    train(copy.deepcopy(case.model), examples, recipe, device=case.device, on_step=lambda _: None)


def _train_bare(case: Case) -> None:
    model, device = copy.deepcopy(case.model).to(case.device).train(), case.device
    optimizer = _optimizer(model, case.config)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (case.spec.mean, case.spec.std))
    images = ((case.images / 255 - mean) / std).to(device)
    labels = case.labels.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.config.precision == "bfloat16")
    for _ in range(case.config.epochs):
        order = torch.randperm(len(images), device=device)
        for begin in range(0, len(images), case.config.batch_size):
            indices = order[begin : begin + case.config.batch_size]
            with autocast:
                train_step(model, optimizer, images[indices], labels[indices])


def _train_usual(case: Case) -> None:
    model, device = copy.deepcopy(case.model).to(case.device).train(), case.device
    optimizer = _optimizer(model, case.config)
    loader = DataLoader(
        Pictures(case), case.config.batch_size, shuffle=True, num_workers=len(os.sched_getaffinity(0)),
        pin_memory=device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    for _ in range(case.config.epochs):
        for images, labels in loader:
            train_step(model, optimizer, images.to(device), labels.to(device))


class Pictures(Dataset[tuple[Tensor, int]]):
    """A dataset that works as torchvision's do: each array becomes a PIL image, and is then transformed."""

    def __init__(self, case: Case) -> None:
        self._arrays: np.ndarray = case.images.permute(0, 2, 3, 1).squeeze(3).numpy()
        self._labels = case.labels.tolist()
        size = case.spec.image_shape[1]
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(case.spec.mean, case.spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._arrays[index])), self._labels[index]


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x_BCHW: Tensor, y_B: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x_BCHW), y_B).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
