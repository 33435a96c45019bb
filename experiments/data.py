"""The data of an experiment: a dataset that is decoded once, of which each seed draws a part of its own.

Agents read the data through their ordinary `--data package.module:factory`, in this process and on the
network. An environment variable, which child processes inherit, says which part the factory returns.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.files import replacing
from common.seeds import derive_seed
from common.shards import Shard, split
from edge_agent.sources import open_source
from edge_agent.splits import ArraySplit

FACTORY = "experiments.data:examples"
_VARIABLE = "EXPERIMENT_DATA"
# If a dataset has no test split, this fraction of its train split is held out as one.
_TEST_FRACTION = 0.25


def prepare(run: RunConfig, data_dir: Path | None, work_dir: Path) -> Path:
    """Write the run's dataset as arrays, `{train,test}-{images,labels}.npy`, and return their folder.

    Raises:
        UsageError: the dataset cannot be read.
    """
    where = hashlib.sha256(str(data_dir and data_dir.resolve()).encode()).hexdigest()[:8]
    folder = work_dir / f"{run.dataset}-{where}"
    if (folder / "test-targets.npy").exists():
        return folder
    source = open_source(run, None, data_dir=data_dir, allowed_factories=())
    train, test = source
    if test is None:
        everything, _ = train.read(np.arange(len(train.targets)), run.spec)
        rest, held_out = split(everything.targets, _TEST_FRACTION, derive_seed(0, "common_test"))
        train, test = (
            ArraySplit(everything.inputs[part], everything.targets[part]) for part in (rest, held_out)
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        shard, _ = part.read(np.arange(len(part.targets)), run.spec)
        for kind, array in shard._asdict().items():
            with replacing(folder / f"{name}-{kind}.npy") as partial, partial.open("wb") as file:
                np.save(file, array)
    return folder


def read(folder: Path, name: str) -> Shard:
    """Return the "train" or the "test" split, memory-mapped from its files."""
    return Shard(*(np.load(folder / f"{name}-{kind}.npy", mmap_mode="r") for kind in Shard._fields))


def choose(folder: Path, num_examples: int, num_test: int, seed: int) -> None:
    """Choose a random part of each split, which the factory returns in this process and its children.

    Args:
        num_examples: the number of train examples at most, which differ from seed to seed.
        num_test: the number of test examples at most, which are always the same.
    """
    parts = {"train": [num_examples, seed], "test": [num_test, 0]}
    os.environ[_VARIABLE] = json.dumps({"folder": str(folder.resolve()), **parts})


def examples(name: str) -> Shard:
    """Return the chosen part of the "train" or the "test" split; this is the factory that agents call."""
    choice = json.loads(os.environ[_VARIABLE])
    return sample(read(Path(choice["folder"]), name), *choice[name])


def sample(shard: Shard, count: int, seed: int) -> Shard:
    """Return at most `count` of the examples, drawn at random, in their order in the shard."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "examples")))
    chosen = np.sort(generator.permutation(len(shard.targets))[:count])
    return Shard(shard.inputs[chosen], shard.targets[chosen])
