"""The loss barrier: the test loss along the line between the weights of two networks.

The measurement follows Frankle et al., arXiv 1912.05671, section 2. BatchNorm's statistics are recomputed at
each point of the line, as in REPAIR, arXiv 2211.08403.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ecavg.cloud_server.trainer.aggregation import mean
from ecavg.cloud_server.trainer.alignment import align_all
from ecavg.cloud_server.trainer.permutations import apply, permutation_groups
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import evaluate, recompute_statistics
from ecavg.common.models import build_model, empty_inputs
from ecavg.common.seeds import derive_seed
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import copy_into, read_state_dict, write_state_dict
from experiments import data

NUM_POINTS = 11
# At most so many images of each split are used.
NUM_IMAGES = 2000


def measure(
    run: RunConfig,
    ends: Sequence[Path],
    folder: Path,
    device: torch.device,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, list[float]]:
    """Measure the test loss (mean cross-entropy, nats) along the line between two networks.

    Args:
        ends: the safetensors files of the two networks.
        folder: the folder with the data, see data.py.

    Returns:
        "place" has the places on the line, from 0 to 1. "as_they_are" has the losses at these places between
        the networks as they are, and "aligned" the losses after the second network's neurons have been
        brought into the order of the first network's.
    """
    model = build_model(run, seed=0)
    groups = permutation_groups(model, empty_inputs(run.spec))
    _, found = align_all(ends, [1.0, 1.0], groups, seed=derive_seed(run.seed, "alignment"))
    train, test = (data.sample(data.read(folder, name), NUM_IMAGES, 0) for name in ("train", "test"))
    images, labels = (torch.from_numpy(array) for array in test)
    places = np.linspace(0, 1, NUM_POINTS).tolist()
    losses: dict[str, list[float]] = {"as_they_are": [], "aligned": []}
    with tempfile.TemporaryDirectory() as scratch:
        aligned = Path(scratch) / "aligned.safetensors"
        write_state_dict(apply(groups, found, read_state_dict(ends[1])), aligned)
        for (name, along), other in zip(losses.items(), (ends[1], aligned), strict=True):
            for place in places:
                copy_into(model, mean([ends[0], other], [1 - place, place]))
                seed = derive_seed(run.seed, "statistics")
                statistics_from = torch.from_numpy(train.inputs)
                recompute_statistics(model, statistics_from, spec=run.spec, device=device, seed=seed)
                along.append(evaluate(model, images, labels, task=task_of(run), device=device).loss)
                on_progress(f"loss barrier, {name.replace('_', ' ')}", len(along), NUM_POINTS)
    return {"place": places, **losses}
