"""The combined data, what teaches, and the fine-tune, on real digits."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from cloud_server.contribution import Contribution
from cloud_server.state_dir import blob_path
from cloud_server.trainer.finetune import Examples, combine, fine_tune, soft_labels
from common.config import FineTuneConfig, RunConfig
from common.models import build_model
from common.shards import Shard, cloud_holdout, write_shard
from common.training import derive_seed, train
from common.weights import write_state_dict

RUN = RunConfig(hidden_units=16, fine_tune=FineTuneConfig(epochs=2, batch_size=32))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Of the classes from 5 on, a few: what is balanced is not what is shuffled."""
    bunch = load_digits()
    chosen = np.flatnonzero((bunch.target < 5) | (np.arange(len(bunch.target)) % 8 == 0))
    images = (bunch.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return Examples(torch.from_numpy(images), torch.from_numpy(bunch.target[chosen].astype(np.int64)))


@pytest.fixture(scope="module")
def teachers(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The weights of three models; each knows other digits."""
    paths = []
    for seed in range(3):
        model = build_model(RUN, seed=seed)
        known = examples.labels % 3 == seed
        train(
            model,
            examples.images[known],
            examples.labels[known],
            RUN.pretrain,
            spec=RUN.spec,
            device=CPU,
            seed=0,
        )
        paths.append(tmp_path_factory.mktemp("weights") / "model.safetensors")
        write_state_dict(model.state_dict(), paths[-1])
    return paths


@pytest.fixture(scope="module")
def taught(examples: Examples, teachers: list[Path]) -> Tensor:
    return soft_labels(
        build_model(RUN, seed=9), teachers, [1, 1, 1], examples.images, spec=RUN.spec, device=CPU
    )


def configured(**options: Any) -> RunConfig:
    return RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update=options)})


def fine_tuned(examples: Examples, run: RunConfig, round_number: int = 3, **more: Any) -> dict[str, Tensor]:
    model = build_model(RUN, seed=1)
    fine_tune(model, examples, run, round_number=round_number, device=CPU, **more)
    return model.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("class_balanced", [False, True])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_fine_tune_is_the_training_that_the_run_asks_for(
    examples: Examples, taught: Tensor, distill: float, class_balanced: bool
) -> None:
    teaching = {"soft_labels": taught} if distill else {}
    expected = build_model(RUN, seed=1)
    train(
        expected,
        *examples,
        RUN.fine_tune,
        spec=RUN.spec,
        device=CPU,
        seed=derive_seed(RUN.seed, 3, "fine_tune"),
        distill=distill,
        class_balanced=class_balanced,
        **teaching,
    )
    run = configured(distill=distill, class_balanced=class_balanced)
    assert equal(fine_tuned(examples, run, **teaching), expected.state_dict())


def test_every_option_makes_another_model(examples: Examples, taught: Tensor) -> None:
    made = [
        fine_tuned(examples, RUN),
        fine_tuned(examples, RUN, round_number=4),
        fine_tuned(examples, RUN.model_copy(update={"seed": 1})),
        fine_tuned(examples, configured(class_balanced=True)),
        fine_tuned(examples, configured(distill=0.5), soft_labels=taught),
        fine_tuned(examples, configured(distill=1.0), soft_labels=taught),
        fine_tuned(examples, configured(distill=0.5), soft_labels=taught.flip(0)),
    ]
    assert len({tuple(state_dict["3.bias"].tolist()) for state_dict in made}) == len(made)


def test_distilling_without_teachers_is_refused(examples: Examples) -> None:
    with pytest.raises(ValueError, match="given together"):
        fine_tuned(examples, configured(distill=0.5))


def ensemble(weights: list[Path], coefficients: list[float], images: Tensor) -> np.ndarray:
    """Mean logits of the mlps, computed anew in float64."""
    (mean,), (std,) = RUN.spec.mean, RUN.spec.std
    x = (images.flatten(1).numpy().astype(np.float64) / 255 - mean) / std
    total = np.zeros((len(x), RUN.spec.num_classes))
    for path, coefficient in zip(weights, coefficients, strict=True):
        layers = {name: array.astype(np.float64) for name, array in load_file(path).items()}
        hidden = np.maximum(x @ layers["1.weight"].T + layers["1.bias"], 0)
        total += coefficient * (hidden @ layers["3.weight"].T + layers["3.bias"])
    return total / sum(coefficients)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("coefficients", [[1.0, 1.0, 1.0], [600.0, 30.0, 170.0], [0.2, 0.0, 0.7]])
def test_soft_labels_are_the_softmax_of_the_weighted_mean_of_logits(
    examples: Examples, teachers: list[Path], coefficients: list[float]
) -> None:
    model = build_model(RUN, seed=9)
    found = soft_labels(model, teachers, coefficients, examples.images, spec=RUN.spec, device=CPU)

    assert len(examples.images) > 512  # more than are predicted at a time
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().sum(1), 1, atol=1e-6)
    expected = softmax(ensemble(teachers, coefficients, examples.images))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shares = np.array(coefficients) / sum(coefficients)
    votes = [softmax(ensemble([path], [1.0], examples.images)) for path in teachers]
    assert np.abs(np.tensordot(shares, votes, 1) - expected).max() > 0.05  # mean of probabilities: another


def test_soft_labels_of_one_agent_are_its_own(examples: Examples, teachers: list[Path]) -> None:
    model = build_model(RUN, seed=9)
    found = soft_labels(model, teachers[:1], [7], examples.images, spec=RUN.spec, device=CPU)
    np.testing.assert_allclose(found, softmax(ensemble(teachers[:1], [1], examples.images)), atol=1e-5)


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
        assert torch.equal(found.images, examples.images[expected])
        assert torch.equal(found.labels, examples.labels[expected])


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
        assert torch.equal(after.images[: len(before.images)], before.images)
        assert len(after.labels) > len(before.labels)


def test_without_shards_there_is_no_data(tmp_path: Path) -> None:
    alone = Contribution("ann", "", (), 5)
    for part in combine(RUN, [alone], tmp_path):
        assert part.images.shape == (0, 1, 8, 8)
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        assert len(part.labels) == 0
