"""Examples without a target that the fine-tune trains on by the start's own predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.finetune import combine, pseudo_labels, read_unlabelled, with_pseudo_labels
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import predict
from ecavg.common.models import build_model
from ecavg.common.shards import Shard, write_shard
from ecavg.common.tasks.task import task_of
from ecavg.common.training import train
from ecavg.common.weights import write_state_dict
from tests.recipes import CPU, put, recipe_of


def configured(confidence: float) -> RunConfig:
    return RunConfig(
        hidden_units=16,
        targets={"missing": True},
        fine_tune={"epochs": 5, "pseudo_label_confidence": confidence},
    )


RUN = configured(0.8)


@pytest.fixture
def contribution(tmp_path: Path) -> Contribution:
    """Return that of an agent with 300 digits, of which every third has a label, and with random weights."""
    bunch = load_digits()
    images = (bunch.images[:300] * (255 / 16)).astype(np.uint8)[:, None]
    labels = np.where(np.arange(300) % 3, -1, bunch.target[:300])
    write_state_dict(build_model(RUN, seed=1).state_dict(), tmp_path / "new")
    weights = put(tmp_path / "new", tmp_path)
    write_shard(tmp_path / "new", Shard(images, labels))
    return Contribution("ann", weights, (put(tmp_path / "new", tmp_path),), 100)


def test_what_the_start_is_sure_of_is_trained_on(contribution: Contribution, tmp_path: Path) -> None:
    data, model = combine(RUN, [contribution], tmp_path), build_model(RUN, seed=1)
    unlabelled = read_unlabelled(RUN, [contribution], tmp_path)
    # A tenth of each class is held back, and so is a tenth of those without one.
    assert len(unlabelled.targets) == 180
    config = RUN.pretrain.model_copy(update={"epochs": 20})
    train(model, data.train, recipe_of(RUN, 2, config), device=CPU)
    p_NK = predict(model, unlabelled.inputs, task=task_of(RUN), device=CPU).softmax(1)
    is_sure = p_NK.amax(1) > 0.8
    found = with_pseudo_labels(data.train, unlabelled, pseudo_labels(model, unlabelled.inputs, RUN, CPU))
    assert 0 < is_sure.sum() < 180
    number = len(data.train.targets)
    assert torch.equal(found.inputs[:number], data.train.inputs)
    assert torch.equal(found.targets[:number], data.train.targets)
    assert torch.equal(found.inputs[number:], unlabelled.inputs[is_sure])
    assert torch.equal(found.targets[number:], p_NK.argmax(1)[is_sure])


def test_round_trains_on_them_and_is_done_twice_with_the_same_bytes(
    contribution: Contribution, tmp_path: Path
) -> None:
    def published(confidence: float, name: str) -> Result:
        job = Job(
            kind="round", name=name, round=1, run=configured(confidence), device="cpu", initial_weights=None
        )
        directory = JobDirectory(tmp_path / "jobs" / name)
        directory.write_job(job.model_copy(update={"contributions": (contribution,)}))
        work.run_job(directory, blobs_dir=tmp_path, device_name="cpu", group=Group())
        result = directory.read_result()
        assert result
        assert result.error is None
        return result

    first, again, without = published(0.05, "first"), published(0.05, "again"), published(0, "without")
    assert first.weights == again.weights
    assert first.score_fine_tuned is not None
    assert without.score_fine_tuned is not None
    # The start knows nothing, so its labels can only do harm.
    assert first.candidates == without.candidates
    assert first.score_fine_tuned < without.score_fine_tuned


@pytest.mark.parametrize("more", [{}, {"task": "multi-label", "targets": {"missing": True}}])
def test_run_that_has_no_use_for_it_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"it takes classification, and targets\.missing"):
        RunConfig(
            dataset="own",
            num_classes=3,
            image_shape=(1, 8, 8),
            fine_tune={"pseudo_label_confidence": 0.8},
            **more,
        )


def test_warm_up_labels_nothing() -> None:
    assert RUN.fine_tune_of(1).pseudo_label_confidence == 0.8
    assert RUN.fine_tune_of(0).pseudo_label_confidence == 0
