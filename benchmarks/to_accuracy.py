"""The seconds of training until a model reaches a fixed accuracy on CIFAR-10, in our loop and the usual one.

    python -m benchmarks.to_accuracy --data DIR --accuracy 0.4 --device cpu

Both loops train MobileNetV2 from the same weights on cropped and flipped 32x32 images, with AdamW and a
constant learning rate. The usual loop has a DataLoader with one worker for each core and torchvision's
transforms, in float32. Both models are evaluated after every epoch on the same test images, and the time of
the evaluation does not count. DIR is an image folder, DIR/{train,test}/<class>/*. With `--precision bfloat16`
our loop trains in bfloat16.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import figures
from benchmarks.train import Case, Pictures, as_the_product, device_name, set_up, train_step
from common.config import RunConfig, TrainingConfig
from common.evaluation import evaluate
from common.models import build_model
from common.shards import Shard
from common.tasks.classification import Classification
from common.training import Examples, Recipe, StepReport, choose_precision, train
from edge_agent.file_split import FileSplit
from edge_agent.image_folder import list_image_folder

SEED = 0
# By default a loop gives up after so many epochs.
MAX_EPOCHS = 50
LEARNING_RATE = 1e-3


class Reached(NamedTuple):
    """The time and epochs that a loop needed; a loop that gave up has less than the wanted accuracy."""

    seconds: float
    # The processor time of this process, without the time of the usual loop's workers.
    cpu_seconds: float
    epochs: int
    accuracy: float


class _Watch:
    """A stopwatch that evaluates the model after each epoch, and leaves out the time of the evaluation."""

    def __init__(self, case: Case, test: Shard, accuracy: float) -> None:
        self._case, self._wanted = case, accuracy
        self._test = torch.from_numpy(test.inputs), torch.from_numpy(test.targets)
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._epochs = 0

    def epoch_finished(self, model: nn.Module) -> Reached | None:
        """Evaluate the model; return the figures if the training is over, None if it must go on."""
        if self._case.device.type == "cuda":
            torch.cuda.synchronize(self._case.device)
        now, cpu_now = time.perf_counter(), time.process_time()
        # An evaluation changes the memory layout of the weights, to the layout of our training. The usual
        # loop's model must keep its own layout, so a copy is evaluated.
        judged = copy.deepcopy(model)
        found = evaluate(
            judged, *self._test, task=Classification(self._case.spec), device=self._case.device
        ).score
        self._epochs += 1
        seconds, cpu_seconds = now - self._started, cpu_now - self._cpu_started
        self._started += time.perf_counter() - now
        self._cpu_started += time.process_time() - cpu_now
        if found < self._wanted and self._epochs < self._case.config.epochs:
            return None
        return Reached(seconds, cpu_seconds, self._epochs, found)


class _Done(Exception):
    """The exception that ends our training when the figures are known."""

    def __init__(self, reached: Reached) -> None:
        self.reached = reached


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    device = set_up(arguments)
    machine = figures.machine()
    run = RunConfig(model="mobilenet_v2", dataset="cifar10")
    files, test_files = list_image_folder(arguments.data, run)
    assert test_files
    images, test = _read(files, arguments.images, run), _read(test_files, arguments.test_images, run)
    config = TrainingConfig(
        epochs=arguments.epochs, batch_size=64, optimizer="adamw", learning_rate=LEARNING_RATE,
        schedule="constant", augment=("random_crop", "horizontal_flip"), precision=arguments.precision,
    )  # fmt: skip
    case = Case(
        build_model(run, seed=SEED),
        torch.from_numpy(images.inputs),
        torch.from_numpy(images.targets),
        run.spec,
        config,
        device,
    )
    found: dict[str, list[Reached]] = {"ours": [], "usual": []}
    for _ in range(arguments.repeats):
        found["ours"].append(_ours(case, _Watch(case, test, arguments.accuracy)))
        found["usual"].append(_usual(case, _Watch(case, test, arguments.accuracy)))
    result: dict[str, Any] = {
        "benchmark": "to_accuracy",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "images": len(images.targets),
        "accuracy": arguments.accuracy,
        "precision": arguments.precision,
        "loops": {name: [each._asdict() for each in trainings] for name, trainings in found.items()},
        "machine": machine,
    }
    rows = [(name, *each) for name, trainings in found.items() for each in trainings]
    headings = ("", "seconds", "processor, s", "epochs", "accuracy")
    figures.emit(result, f"CIFAR-10 to {arguments.accuracy} on {result['device']}", headings, rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="image folder of CIFAR-10")
    parser.add_argument("--accuracy", type=float, default=0.4, metavar="A", help="0 to 1, when to stop")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="to train on")
    parser.add_argument("--test-images", type=int, default=2_000, metavar="N", help="to measure on")
    parser.add_argument("--epochs", type=int, default=MAX_EPOCHS, metavar="N", help="when to give up")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="trainings in each way")
    return parser.parse_args(argv)


def _read(files: FileSplit, num_images: int, run: RunConfig) -> Shard:
    """Read at most `num_images` of the images, drawn at random."""
    indices = np.random.default_rng(SEED).permutation(len(files.paths))[:num_images]
    return files.read(indices, run.spec)[0]


def _ours(case: Case, watch: _Watch) -> Reached:
    model, examples = copy.deepcopy(case.model), Examples(case.images, case.labels)
    precision = choose_precision(
        model, examples, case.config, task=Classification(case.spec), device=case.device
    )
    recipe = Recipe(case.config, Classification(case.spec), SEED, precision)
    steps_per_epoch = -(-len(case.images) // case.config.batch_size)
    due = iter(range(steps_per_epoch, case.config.epochs * steps_per_epoch + 1, steps_per_epoch))
    next_due = next(due)

    def on_step(report: StepReport) -> None:
        nonlocal next_due
        # On a GPU, reports come some steps late.
        if report.step >= next_due:
            if reached := watch.epoch_finished(model):
                raise _Done(reached)
            next_due = next(due)

    try:
        with as_the_product(case.device):
            train(model, examples, recipe, device=case.device, on_step=on_step)
    except _Done as done:
        return done.reached
    raise AssertionError("the last report is of the last step")


def _usual(case: Case, watch: _Watch) -> Reached:
    model = copy.deepcopy(case.model).to(case.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    loader = DataLoader(
        Pictures(case), case.config.batch_size, shuffle=True, num_workers=len(os.sched_getaffinity(0)),
        pin_memory=case.device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    while True:
        for images, labels in loader:
            train_step(model, optimizer, images.to(case.device), labels.to(case.device))
        if reached := watch.epoch_finished(model):
            return reached


if __name__ == "__main__":
    sys.exit(main())
