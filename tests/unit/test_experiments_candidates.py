"""The models that a round has weighed are made again, and are the same ones."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from ecavg.cloud_server.trainer.finetune import combine
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import evaluate
from ecavg.common.layers import deep_merge
from ecavg.common.tasks.task import task_of
from experiments import data
from experiments.candidates import held_out_scores
from experiments.round import Network, round_job
from experiments.tasks import TASKS, Setting

SHORT = {"pretrain": {"epochs": 3}, "fine_tune": {"epochs": 2}}
KEPT_HIGH = {"fine_tune": {"ema_decay": 0.95, "schedule": "constant", "learning_rate": 0.3}}
HARMFUL = {"fine_tune": {"learning_rate": 5.0}}


def nothing(*_: Any) -> None: ...


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({}, "fine_tuned"),
        (HARMFUL, "start"),
        ({"wire": "int8"}, "fine_tuned"),
        (KEPT_HIGH, "fine_tuned_average"),
        ({"wire": "int8", **KEPT_HIGH}, "fine_tuned_average"),
        ({"wire": "int8", **HARMFUL}, "start"),
        ({"max_norm_ratio": 1.01}, "fine_tuned"),  # the longest update of three is clipped
        ({"max_norm_ratio": 1.01, "on_large_update": "reject"}, "fine_tuned"),
    ],
)
def test_they_have_the_accuracies_that_the_trainer_has_measured(
    changes: dict[str, Any], published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERIMENT_DATA", "")  # what is written there ends with the test
    run = RunConfig(**deep_merge(TASKS["digits"].run, deep_merge(SHORT, changes)))
    setting = Setting("digits", run, data.prepare(run, None, tmp_path), 3, 300, 100)
    cpu = torch.device("cpu")
    with closing(Network(setting, tmp_path / "network", cpu, nothing)) as network:
        job = round_job(run, 1, network.start(None), network.contribute(run, 1, None))
        result = network.cloud.publish(job, nothing)
        assert result.published == published
        if "max_norm_ratio" in changes:
            assert any(agent.left_out or agent.scale < 1 for agent in result.audit)
        left_out = {agent.agent_id for agent in result.audit if agent.left_out}
        kept = [item for item in job.contributions if item.agent_id not in left_out]
        held_out = combine(run, kept, network.cloud.blobs.path).held_out
        found = {
            name: evaluate(model, *held_out, task=task_of(run), device=cpu).score
            for name, model in network.cloud.weighed(job, result)
        }
    assert found == held_out_scores(result)
    assert ("fine_tuned_average" in found) == bool(run.fine_tune.ema_decay)
