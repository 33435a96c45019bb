"""The speed of our training loop in images a second, compared with a bare loop and the usual loop.

    python -m benchmarks.train --models mlp mobilenet_v2 resnet50 --device cpu

The bare loop has float32 images in memory, normalised once, in a new order in each epoch. It trains the model
as torchvision makes it with cross-entropy and SGD, in the same precision as our loop. It reports and augments
nothing. Our loop is compared with it on the same model, data and optimizer, without augmentation.
The usual loop has a DataLoader with one worker for each core, which makes PIL images and applies RandomCrop,
RandomHorizontalFlip, ToTensor and Normalize of torchvision, in float32. For the comparison with it, our loop
crops and flips, too. The loops take turns, and each run of ours is compared with the run next to it.

On a GPU our loop runs as in the product, with deterministic algorithms, once as CUDA graphs and once without
(`eager`). The other loops keep PyTorch's defaults. `--data-on-host` adds our loop with the images in the
memory of the host. The share of the peak is the number of multiplications and additions of a training step,
as `torch.utils.flop_counter` counts them, times the images a second, over the peak that the card's maker
states.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks import figures
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import DATASETS, DatasetSpec
from ecavg.common.devices import make_deterministic, select_device
from ecavg.common.errors import UsageError
from ecavg.common.models import build_model
from ecavg.common.tasks.classification import Classification
from ecavg.common.tasks.task import main_output
from ecavg.common.training import Examples, Recipe, choose_precision, train

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
# The peaks of GPUs in bfloat16 without sparsity, in TFLOP/s. The first name that is in the card's counts.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}


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
    peak = arguments.peak_tflops or _known_peak(device, arguments.precision)
    measured = {
        name: _measure(
            _case(name, device, arguments), arguments.repeats, peak, has_host_loop=arguments.data_on_host
        )
        for name in arguments.models
    }
    result = {
        "benchmark": "train",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "peak_tflops": peak,
        "models": measured,
        "machine": machine,
    }
    headings = {
        "of_bare": "speed, of bare",
        "of_usual": "of usual",
        "of_eager": "of eager",
        "on_host_of_ours": "on host, of ours",
        "share_of_peak": "share of peak",
    }
    rows = [
        (name, each["images_per_second"]["ours"]["median"], *(each.get(key, "") for key in headings))
        for name, each in measured.items()
    ]
    figures.emit(result, f"training on {result['device']}", ("", "ours, images/s", *headings.values()), rows)
    return 0


def set_up(arguments: argparse.Namespace) -> torch.device:
    """Set PyTorch's number of threads as `--threads` says, and return the device that `--device` names."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return select_device(arguments.device)
    except UsageError as error:
        sys.exit(str(error))


@contextmanager
def as_the_product(device: torch.device) -> Iterator[None]:
    """Compute on a GPU as agents and trainer do: the same bits each time; afterwards, as PyTorch does."""
    if device.type == "cpu":
        yield
        return
    make_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.allow_tf32 = True


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
    parser.add_argument("--data-on-host", action="store_true", help="also with images that stay on the host")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the device (default: by its name)")
    return parser.parse_args(argv)


def _case(name: str, device: torch.device, arguments: argparse.Namespace) -> Case:
    workload = WORKLOADS[name]
    num_images = arguments.images or (
        workload.num_images_gpu if device.type == "cuda" else workload.num_images
    )
    run = RunConfig(model=name, dataset=workload.dataset, small_images=name in AUGMENTED)
    generator = torch.Generator().manual_seed(SEED)
    shape = (num_images, *run.spec.inputs.shape)
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


def _known_peak(device: torch.device, precision: str) -> float | None:
    """Return the peak of the GPU in TFLOP/s; None: it is not known."""
    if precision != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_name(device)), None)


def _measure(case: Case, repeats: int, peak: float | None, *, has_host_loop: bool) -> dict[str, Any]:
    """Run the loops in turn; compare our augmented loop with the usual loop, which augments, too.

    Args:
        peak: the peak of the device, in TFLOP/s; None: there is no share of it.
        has_host_loop: whether our loop is also measured with images that are not on the device.
    """
    augmented = case._replace(
        config=case.config.model_copy(update={"augment": ("random_crop", "horizontal_flip")})
    )
    loops: dict[str, Callable[[], object]] = {
        "ours": lambda: _train_ours(case),
        "bare": lambda: _train_bare(case),
        "ours_augmented": lambda: _train_ours(augmented),
        "usual": lambda: _train_usual(case),
    }
    if case.device.type == "cuda":
        eager = case._replace(config=case.config.model_copy(update={"graphs": "off"}))
        loops["eager"] = lambda: _train_ours(eager)
    if has_host_loop:
        loops["on_host"] = lambda: _train_ours_on_host(case)
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
    compared = {
        "of_bare": figures.ratios(seconds["bare"], seconds["ours"]),
        "of_usual": figures.ratios(seconds["usual"], seconds["ours_augmented"]),
    }
    if "eager" in loops:
        compared["of_eager"] = figures.ratios(seconds["eager"], seconds["ours"])
    if "on_host" in loops:
        compared["on_host_of_ours"] = figures.ratios(seconds["ours"], seconds["on_host"])
    flops = _flops_per_image(case)
    if peak:
        compared["share_of_peak"] = figures.spread(
            [num_images * flops / each / (peak * 1e12) for each in seconds["ours"]]
        )
    return {
        "images": num_images,
        "batch_size": case.config.batch_size,
        "images_per_second": {
            name: figures.spread([num_images / each for each in taken]) for name, taken in seconds.items()
        },
        "flops_per_image": flops,
        **compared,
        # The processor time of this process lacks the time of the usual loop's workers, so there is no such
        # figure for the usual loop. With one thread, the figure equals the ratio on an idle machine.
        "of_bare_cpu": figures.ratios(cpu_seconds["bare"], cpu_seconds["ours"]),
    }


def _flops_per_image(case: Case) -> float:
    """Return the multiplications and additions of a training step, for one image."""
    model = copy.deepcopy(case.model).train()
    counter = FlopCounterMode(display=False)
    with counter:
        main_output(model(case.images[:2].float())).sum().backward()
    return counter.get_total_flops() / 2


def _train_ours(case: Case) -> None:
    examples = Examples(case.images, case.labels)
    precision = choose_precision(
        case.model, examples, case.config, task=Classification(case.spec), device=case.device
    )
    recipe = Recipe(case.config, Classification(case.spec), SEED, precision)
    with as_the_product(case.device):
        train(copy.deepcopy(case.model), examples, recipe, device=case.device, on_step=lambda _: None)


def _train_ours_on_host(case: Case) -> None:
    with patch("ecavg.common.batches._fits", return_value=False):
        _train_ours(case)


def _train_bare(case: Case) -> None:
    model, device = copy.deepcopy(case.model).to(case.device).train(), case.device
    optimizer = _optimizer(model, case.config)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (case.spec.inputs.mean, case.spec.inputs.std)
    )
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
        size = case.spec.inputs.shape[1]
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(case.spec.inputs.mean, case.spec.inputs.std),
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
