"""The combined data, what teaches, and the fine-tune, on real digits."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.finetune import combine, fine_tune
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.models import build_model
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, cloud_holdout, write_shard
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, train

RUN = RunConfig(hidden_units=16, fine_tune=FineTuneConfig(epochs=2, batch_size=32))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Of the classes from 5 on, a few: what is balanced is not what is shuffled."""
    bunch = load_digits()
    chosen = np.flatnonzero((bunch.target < 5) | (np.arange(len(bunch.target)) % 8 == 0))
    images = (bunch.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return Examples(torch.from_numpy(images), torch.from_numpy(bunch.target[chosen].astype(np.int64)))


def configured(**options: Any) -> RunConfig:
    return RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update=options)})


def fine_tuned(examples: Examples, run: RunConfig, round_number: int = 3, **more: Any) -> dict[str, Tensor]:
    model = build_model(RUN, seed=1)
    fine_tune(model, examples, run, round_number=round_number, device=CPU, **more)
    return model.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("class_balanced", [False, True])
def test_fine_tune_is_the_training_that_the_run_asks_for(examples: Examples, class_balanced: bool) -> None:
    expected = build_model(RUN, seed=1)
    seed = derive_seed(RUN.seed, 3, "fine_tune")
    recipe = Recipe(RUN.fine_tune, Classification(RUN.spec), seed, "float32", class_balanced)
    train(expected, examples, recipe, device=CPU)
    run = configured(class_balanced=class_balanced)
    assert equal(fine_tuned(examples, run), expected.state_dict())


def test_every_option_makes_another_model(examples: Examples) -> None:
    made = [
        fine_tuned(examples, RUN),
        fine_tuned(examples, RUN, round_number=4),
        fine_tuned(examples, RUN.model_copy(update={"seed": 1})),
        fine_tuned(examples, configured(class_balanced=True)),
    ]
    assert len({tuple(state_dict["3.bias"].tolist()) for state_dict in made}) == len(made)


def test_warm_up_is_the_fine_tune_for_epochs_of_its_own(examples: Examples) -> None:
    run = RUN.model_copy(update={"warm_up_epochs": 3})
    expected = build_model(RUN, seed=1)
    config = RUN.fine_tune.model_copy(update={"epochs": 3})
    recipe = Recipe(config, Classification(RUN.spec), derive_seed(RUN.seed, 0, "fine_tune"), "float32")
    train(expected, examples, recipe, device=CPU)
    assert equal(fine_tuned(examples, run, round_number=0), expected.state_dict())
    assert equal(fine_tuned(examples, run), fine_tuned(examples, RUN))


def put_shard(images: np.ndarray, labels: np.ndarray, blobs_dir: Path) -> str:
    write_shard(blobs_dir / "new", Shard(images, labels))
    digest = hashlib.sha256((blobs_dir / "new").read_bytes()).hexdigest()
    blob_path(blobs_dir, digest).parent.mkdir(exist_ok=True)
    (blobs_dir / "new").rename(blob_path(blobs_dir, digest))
    return digest


def test_combined_data_is_that_of_each_shard_in_turn_split_as_the_agent_splits_it(
    examples: Examples, tmp_path: Path
) -> None:
    images, labels = (tensor.numpy() for tensor in examples)
    agents = {"ann": [(0, 60)], "bob": [], "cid": [(60, 61)], "dot": [(61, 100), (100, 260)]}
    contributions, rest, held_out = [], [], []
    for agent_id, bounds in agents.items():
        shards = tuple(put_shard(images[begin:end], labels[begin:end], tmp_path) for begin, end in bounds)
        contributions.append(Contribution(agent_id, "", shards, 1))
        for begin, end in bounds:
            seed = derive_seed(RUN.seed, "cloud_holdout", agent_id)
            train_on, hold_back = cloud_holdout(labels[begin:end], RUN.fine_tune.holdout_fraction, seed)
            rest += (begin + train_on).tolist()
            held_out += (begin + hold_back).tolist()

    data = combine(RUN, contributions, tmp_path)

    assert (len(rest), len(held_out)) == (54 + 1 + 35 + 144, 6 + 0 + 4 + 16)
    for found, expected in ((data.train, rest), (data.held_out, held_out)):
        assert torch.equal(found.inputs, examples.inputs[expected])
        assert torch.equal(found.targets, examples.targets[expected])


def test_another_shard_moves_no_example_to_or_from_those_held_back(
    examples: Examples, tmp_path: Path
) -> None:
    images, labels = (tensor.numpy() for tensor in examples)
    first, second = (put_shard(images[part], labels[part], tmp_path) for part in (slice(90), slice(90, 130)))
    small, grown = (
        combine(
            RUN,
            [Contribution("ann", "", shards, 1)],
            tmp_path,
        )
        for shards in ((first,), (first, second))
    )
    for before, after in zip(small, grown, strict=True):
        assert torch.equal(after.inputs[: len(before.inputs)], before.inputs)
        assert len(after.targets) > len(before.targets)


def test_without_shards_there_is_no_data(tmp_path: Path) -> None:
    alone = Contribution("ann", "", (), 5)
    for part in combine(RUN, [alone], tmp_path):
        assert part.inputs.shape == (0, 1, 8, 8)
        assert (part.inputs.dtype, part.targets.dtype) == (torch.uint8, torch.int64)
        assert len(part.targets) == 0
