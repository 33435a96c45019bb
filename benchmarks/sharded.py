"""What each of several ranks holds in memory while it trains one large model, whole or sharded.

    python -m benchmarks.sharded --mib 300 --ranks 1 2 4

The ranks are processes on this machine, over Gloo, and train with AdamW: with the parameters, their gradients
and two moments, a whole model takes four times its size. The memory is a rank's own, without the pages of
files, above what it had before the model: after a step, and the most within a step.

On a CPU, FSDP2 allocates and frees each unit's tensors in every step. By default glibc keeps freed blocks of
this size in its heap; the ranks have an environment in which it gives them back, but not with
`--default-malloc`.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks import figures
from benchmarks.processes import memory_bytes
from ecavg.common.config import TrainingConfig
from ecavg.common.dataset import pictures
from ecavg.common.ranks import Ranks
from ecavg.common.sharding import shard
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train

WIDTH = 2048
SPEC = pictures(10, (2, 32, 32), (0.5, 0.5), (0.25, 0.25))
BATCH_SIZE, NUM_STEPS = 16, 4
# From so many bytes on, glibc gives back what is freed, at once.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.rank is not None:
        print(json.dumps(_one_rank(arguments)))
        return 0
    machine = figures.machine()
    measured = {
        f"{kind}, {number}": _measure(arguments, kind, number)
        for number in arguments.ranks
        for kind in (("ddp", "fsdp") if number > 1 else ("ddp",))
    }
    size = num_blocks(arguments.mib) * WIDTH * WIDTH * 4
    settings = {"model_bytes": size, "default_malloc": arguments.default_malloc}
    result = {"benchmark": "sharded", **settings, "ranks": measured, "machine": machine}
    rows = [(name, *each.values()) for name, each in measured.items()]
    headings = ("ranks", "MiB after a step", "most MiB", "seconds a step")
    figures.emit(result, f"a model of {size >> 20} MiB", headings, rows)
    return 0


def num_blocks(mib: int) -> int:
    """Return how many square layers make a model of about so many MiB."""
    return max(1, round((mib << 20) / (WIDTH * WIDTH * 4)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--mib", type=int, default=300, metavar="N", help="the size of the model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="how many")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's malloc alone")
    parser.add_argument("--kind", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measure(arguments: argparse.Namespace, kind: str, world_size: int) -> dict[str, float]:
    """Return the largest figures of all ranks, in MiB and seconds."""
    command = [sys.executable, "-m", "benchmarks.sharded", "--mib", str(arguments.mib), "--kind", kind]
    environ = os.environ if arguments.default_malloc else {**os.environ, **GIVES_BACK}
    with tempfile.TemporaryDirectory(prefix="sharded-") as folder:
        command += ["--folder", folder, "--ranks", str(world_size)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environ, stdout=subprocess.PIPE, text=True)
            for rank in range(world_size)
        ]
        measured: list[dict[str, float]] = [json.loads(process.communicate()[0]) for process in ranks]
    return {name: max(each[name] for each in measured) for name in measured[0]}


def _one_rank(arguments: argparse.Namespace) -> dict[str, float]:
    """Train a few steps as one rank, and return what that has taken, in MiB and seconds."""
    torch.set_num_threads(1)
    ranks = Ranks(arguments.rank, arguments.ranks[0], arguments.rank)
    if ranks.world_size > 1:
        where = f"file://{arguments.folder}/rendezvous"
        torch.distributed.init_process_group(
            "gloo", init_method=where, rank=ranks.rank, world_size=ranks.world_size
        )
    # What is imported later would count as the model's.
    importlib.import_module("torch.distributed.fsdp")
    device, before = torch.device("cpu"), _own_mib("RssAnon")
    layers = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())
        for _ in range(num_blocks(arguments.mib))
    ]
    model: nn.Module = nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, 10))
    if arguments.kind == "fsdp":
        model = shard(model, ranks, device)
    after, moments = [0.0], [time.perf_counter()]
    # The most memory counts from here, without the building of the model.
    Path("/proc/self/clear_refs").write_text("5", "utf-8")

    def on_step(_: StepReport) -> None:
        after[0] = max(after[0], _own_mib("RssAnon") - before)
        moments.append(time.perf_counter())

    generator = torch.Generator().manual_seed(0)
    number = BATCH_SIZE * NUM_STEPS
    images = torch.randint(0, 256, (number, 2, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (number,), generator=generator)
    config = TrainingConfig(epochs=1, batch_size=BATCH_SIZE, optimizer="adamw", learning_rate=1e-4)
    recipe = Recipe(config, Classification(SPEC), 0, "float32")
    train(model, Examples(images, labels), recipe, device=device, ranks=ranks, on_step=on_step)
    most = _own_mib("VmHWM") - _own_mib("RssFile") - before
    return {
        "after_step_mib": round(after[0], 1),
        "most_mib": round(most, 1),
        "step_seconds": round((moments[-1] - moments[0]) / NUM_STEPS, 2),
    }


def _own_mib(what: str) -> float:
    """Return a figure of this process's memory, by its name in /proc, in MiB."""
    return memory_bytes(what) / 2**20


if __name__ == "__main__":
    sys.exit(main())
