"""The data of an experiment: a dataset decoded once, and a part of it drawn anew for each seed.

Agents read it through their ordinary `--data package.module:factory`, in this process as on the network.
What the factory gives is said in the environment, which processes inherit.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.files import replacing
from common.shards import Shard, split
from common.training import derive_seed
from edge_agent.data import ArraySplit, open_source

FACTORY = "experiments.data:examples"
_VARIABLE = "EXPERIMENT_DATA"
_TEST_FRACTION = 0.25  # of a dataset that has no test split of its own


def prepare(run: RunConfig, data_dir: Path | None, work_dir: Path) -> Path:
    """The folder with the run's dataset as arrays, `{train,test}-{images,labels}.npy`.

    Raises:
        UsageError: the dataset cannot be read.
    """
    where = hashlib.sha256(str(data_dir and data_dir.resolve()).encode()).hexdigest()[:8]
    folder = work_dir / f"{run.dataset}-{where}"
    if (folder / "test-labels.npy").exists():
        return folder
    source = open_source(run, None, data_dir=data_dir, allowed_factories=())
    train, test = source
    if test is None:
        everything, _ = train.read(np.arange(len(train.labels)), run.spec.image_shape)
        rest, held_out = split(everything.labels, _TEST_FRACTION, derive_seed(0, "common_test"))
        train, test = (
            ArraySplit(everything.images[part], everything.labels[part]) for part in (rest, held_out)
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        shard, _ = part.read(np.arange(len(part.labels)), run.spec.image_shape)
        for kind, array in shard._asdict().items():
            with replacing(folder / f"{name}-{kind}.npy") as partial, partial.open("wb") as file:
                np.save(file, array)
    return folder


def read(folder: Path, name: str) -> Shard:
    """The "train" or the "test" split, mapped from its files."""
    return Shard(*(np.load(folder / f"{name}-{kind}.npy", mmap_mode="r") for kind in Shard._fields))


def choose(folder: Path, num_examples: int, num_test: int, seed: int) -> None:
    """Say what the factory gives in this process, and in those that it starts: a random part of each split.

    Args:
        num_examples: at most, of the train split; others with each seed.
        num_test: at most, of the test split; always the same.
    """
    parts = {"train": [num_examples, seed], "test": [num_test, 0]}
    os.environ[_VARIABLE] = json.dumps({"folder": str(folder.resolve()), **parts})


def examples(name: str) -> Shard:
    """The factory: what was chosen of the "train" or the "test" split."""
    choice = json.loads(os.environ[_VARIABLE])
    return sample(read(Path(choice["folder"]), name), *choice[name])


def sample(shard: Shard, count: int, seed: int) -> Shard:
    """So many of the examples at most, drawn at random, in their old order."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "examples")))
    chosen = np.sort(generator.permutation(len(shard.labels))[:count])
    return Shard(shard.images[chosen], shard.labels[chosen])
