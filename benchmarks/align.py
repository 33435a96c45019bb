"""The seconds that it takes to bring the neurons of all contributions into one order, and what takes them.

    python -m benchmarks.align --model resnet50 --agents 4 --weights near --threads 1

The weights are random numbers. With `near`, each agent's differ a little from those of the agent before, as
after a training from common weights. With `permuted`, they also have their neurons in a random order. With
`independent`, each agent has weights of its own. The files are in the page cache. The parts are in seconds of
the processor, of all threads, as a profile of the calls has them.
"""

import argparse
import cProfile
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn

from benchmarks import figures
from ecavg.cloud_server.trainer.alignment import align_all
from ecavg.cloud_server.trainer.permutations import PermutationGroup, apply, permutation_groups
from ecavg.common.weights import write_state_dict

WEIGHTS = ("near", "permuted", "independent")
# The functions that a part consists of, as a profile names them. None of them calls another.
PARTS = {
    "reading": ("read_state_dict",),
    "similarities": ("<method 'addmm_' of 'torch._C.TensorBase' objects>", "as_matrix"),
    "assignments": ("<built-in method scipy.optimize._lsap.linear_sum_assignment>",),
    "permuting": ("permute_in_place", "_copy"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = figures.machine()
    model = _model(arguments.model)
    groups = permutation_groups(model, torch.zeros(2, 3, 224, 224))
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        paths = _write(model, groups, arguments, Path(folder))
        measured = [_measure(paths, groups) for _ in range(arguments.repeats)]
    spreads = {name: figures.spread([each[name] for each in measured]) for name in measured[0]}
    result = {
        "benchmark": "align",
        "model": arguments.model,
        "agents": arguments.agents,
        "weights": arguments.weights,
        "groups": len(groups),
        "threads": torch.get_num_threads(),
        "seconds": spreads,
        "machine": machine,
    }
    title = f"{arguments.model} of {arguments.agents} agents, {arguments.weights}"
    figures.emit(result, title, ("", "seconds"), list(spreads.items()))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="whose weights: torchvision's")
    parser.add_argument("--agents", type=int, default=4, metavar="K", help="how many contributions")
    parser.add_argument("--weights", choices=WEIGHTS, default="near", help="how the agents' weights differ")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="how often")
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's threads; else as many as cores")
    return parser.parse_args(argv)


def _model(name: str) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def _write(
    model: nn.Module, groups: Sequence[PermutationGroup], arguments: argparse.Namespace, folder: Path
) -> list[Path]:
    """Write one file of weights for each agent, and return the paths."""
    torch.manual_seed(0)
    paths = []
    for index in range(arguments.agents):
        if arguments.weights == "independent":
            model = _model(arguments.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.003)
        state_dict = model.state_dict()
        if arguments.weights == "permuted":
            state_dict = apply(groups, [torch.randperm(group.size) for group in groups], state_dict)
        paths.append(folder / f"agent-{index + 1}.safetensors")
        write_state_dict(state_dict, paths[-1])
    return paths


def _measure(paths: Sequence[Path], groups: Sequence[PermutationGroup]) -> dict[str, float]:
    """Return the seconds of the whole, on the clock and of the processor, and of its parts."""
    started, cpu_started = time.perf_counter(), time.process_time()
    with cProfile.Profile(time.process_time) as profile:
        align_all(paths, [1.0] * len(paths), groups, seed=0)
    whole = {"wall": time.perf_counter() - started, "processor": time.process_time() - cpu_started}
    taken = {getattr(entry.code, "co_name", entry.code): entry.totaltime for entry in profile.getstats()}
    return whole | {part: sum(taken[name] for name in names) for part, names in PARTS.items()}


if __name__ == "__main__":
    sys.exit(main())
