"""The speed of our aggregators, compared with a bare addition of the same bytes in memory-mapped files.

    python -m benchmarks.aggregate --model resnet50 --agents 4 --repeats 3

The bare addition keeps one float32 sum in memory, to which PyTorch adds file after file as fast as it can.
It takes no mean, does not use float64, and checks nothing. The bare addition and our aggregators take turns,
and each run of ours is compared with the bare run just before it. The files are in the page cache for both.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from benchmarks import figures
from benchmarks.processes import peak_bytes, reset_peak
from ecavg.cloud_server.trainer.aggregation import aggregate
from ecavg.common.config import RunConfig
from ecavg.common.schema import read_header
from ecavg.common.weights import write_state_dict

AGGREGATORS = ("mean", "trimmed_mean", "median", "geometric_median")


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    machine = figures.machine()
    model = torchvision.models.get_model(arguments.model, weights=None)
    with tempfile.TemporaryDirectory(prefix="aggregate-") as folder:
        paths = _write(model, Path(folder), arguments.agents)
        num_bytes = paths[0].stat().st_size
        measured = {
            name: _measure(name, model, paths, arguments.repeats, num_bytes) for name in arguments.aggregators
        }
    result = {
        "benchmark": "aggregate",
        "model": arguments.model,
        "model_bytes": num_bytes,
        "agents": arguments.agents,
        "threads": torch.get_num_threads(),
        "aggregators": measured,
        "machine": machine,
    }
    rows = [(name, *each.values()) for name, each in measured.items()]
    headings = ("", "ours, s", "bare, s", "speed, of bare", "by processor", "memory, models")
    figures.emit(result, f"{arguments.model} of {arguments.agents} agents", headings, rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="whose weights: torchvision's")
    parser.add_argument("--agents", type=int, default=4, metavar="K", help="how many contributions")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each aggregator")
    parser.add_argument("--aggregators", nargs="+", choices=AGGREGATORS, default=AGGREGATORS, help="which")
    return parser.parse_args(argv)


def _write(model: nn.Module, folder: Path, num_agents: int) -> list[Path]:
    """Write one file of weights for each agent, all of them different, and return the paths."""
    paths = []
    for index in range(num_agents):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        paths.append(folder / f"agent-{index + 1}.safetensors")
        write_state_dict(model.state_dict(), paths[-1])
    return paths


def _measure(
    aggregator: str, model: nn.Module, paths: Sequence[Path], repeats: int, num_bytes: int
) -> dict[str, dict[str, float]]:
    run = RunConfig(aggregator=aggregator, trim_fraction=0.25)
    compared = [name for name, _ in model.named_parameters()]
    coefficients = [float(index + 1) for index in range(len(paths))]
    ours, bare, memory = [], [], []
    for index in range(repeats + 1):
        bare_taken = _taken(lambda: _add(paths))
        before = reset_peak()
        our_taken = _taken(lambda: aggregate(paths, coefficients, run, compared=compared))
        # The first pair is a warm-up.
        if index:
            bare.append(bare_taken)
            ours.append(our_taken)
            memory.append((peak_bytes() - before) / num_bytes)
    (our_seconds, our_cpu), (bare_seconds, bare_cpu) = (zip(*each, strict=True) for each in (ours, bare))
    return {
        "ours_seconds": figures.spread(our_seconds),
        "bare_seconds": figures.spread(bare_seconds),
        "speed": figures.ratios(bare_seconds, our_seconds),
        # Processor time is disturbed less by other work on the machine than wall time.
        "speed_cpu": figures.ratios(bare_cpu, our_cpu),
        "memory_in_models": figures.spread(memory),
    }


def _add(paths: Sequence[Path]) -> None:
    """Add up the data of all files, read as float32 whatever their type."""
    start = read_header(paths[0]).data_start
    total = torch.zeros((paths[0].stat().st_size - start) // 4)
    for path in paths:
        # PyTorch warns of read-only memory. Mode "c" is copy on write, and nothing is written.
        mapped = np.memmap(path, np.float32, mode="c", offset=start, shape=(len(total),))
        total.add_(torch.from_numpy(mapped))


def _taken(work: Callable[[], object]) -> tuple[float, float]:
    """Do the work, and return the wall seconds and the processor seconds that it took."""
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu_started


if __name__ == "__main__":
    sys.exit(main())
