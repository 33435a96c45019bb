"""Rounds of every task, by the real trainer and the real agent's models, in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.config import RunConfig
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import InvalidError, Reason
from ecavg.common.models import build_model
from ecavg.common.schema import check_examples, check_shard, read_header
from ecavg.common.shards import Shard, write_shard
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Examples, Recipe, train
from ecavg.common.weights import write_state_dict
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.state import AgentState
from tests.recipes import CPU, put

RNG = np.random.default_rng(0)
NUM_EXAMPLES = 120
TRAINED = {"epochs": 4, "batch_size": 16, "optimizer": "adam", "learning_rate": 0.01}


def table() -> np.ndarray:
    return RNG.standard_normal((NUM_EXAMPLES, 4)).astype(np.float32)


def regression() -> Shard:
    rows = table()
    return Shard(rows, (50 + 8 * rows[:, :1] - 3 * rows[:, 1:2]).astype(np.float32))


def multi_label() -> Shard:
    rows = table()
    return Shard(rows, (rows[:, :3] > 0).astype(np.int64))


def windows() -> Shard:
    labels = RNG.integers(0, 2, NUM_EXAMPLES)
    phase = np.arange(16) * (0.5 + labels[:, None]) + RNG.random((NUM_EXAMPLES, 1)) * 6
    return Shard(np.sin(phase)[:, None].astype(np.float32), labels)


def segmentation() -> Shard:
    images = RNG.integers(0, 256, (NUM_EXAMPLES, 1, 4, 4), dtype=np.uint8)
    return Shard(images, (images[:, 0] > 127).astype(np.int64))


OWN: dict[str, Any] = {"dataset": "own", "model": "mlp", "pretrain": TRAINED, "fine_tune": TRAINED}
CASES: dict[str, tuple[RunConfig, Callable[[], Shard], float]] = {
    "regression": (
        RunConfig(
            **OWN,
            task="regression",
            inputs={"shape": (4,), "low": -10, "high": 10},
            targets={"low": 0, "high": 100, "mean": (50,), "std": (8,)},
        ),
        regression,
        0.5,
    ),
    "multi-label": (
        RunConfig(**OWN, task="multi-label", num_classes=3, inputs={"shape": (4,)}),
        multi_label,
        0.8,
    ),
    "segmentation": (
        RunConfig(**OWN, task="segmentation", num_classes=2, image_shape=(1, 4, 4)),
        segmentation,
        0.5,
    ),
    "windows": (
        RunConfig(**{**OWN, "model": "gru"}, num_classes=2, inputs={"shape": (1, 16)}, hidden_units=16),
        windows,
        0.7,
    ),
}


def contributed(run: RunConfig, shard: Shard, agent_id: str, blobs_dir: Path) -> Contribution:
    """Return the contribution of an agent that has trained on its shard, which passes the gate."""
    model = build_model(run)
    examples = Examples(*map(torch.from_numpy, shard))
    train(model, examples, Recipe(run.pretrain, task_of(run), 1, "float32"), device=CPU)
    write_state_dict(model.state_dict(), blobs_dir / "new")
    weights = put(blobs_dir / "new", blobs_dir)
    write_shard(blobs_dir / "new", shard)
    pass_gate(blobs_dir / "new", run.spec)
    return Contribution(agent_id, weights, (put(blobs_dir / "new", blobs_dir),), len(shard.targets))


def done(job: Job, folder: Path, blobs_dir: Path) -> Result:
    directory = JobDirectory(folder / "jobs" / job.name)
    directory.write_job(job)
    work.run_job(directory, blobs_dir=blobs_dir, device_name="cpu", group=Group())
    result = directory.read_result()
    assert result
    assert result.error is None
    return result


@pytest.mark.parametrize("name", CASES)
def test_round_of_every_task_is_done_twice_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    run, make, least = CASES[name]
    blobs_dir = tmp_path / "blobs"
    blobs_dir.mkdir()
    contributions = tuple(contributed(run, make(), agent_id, blobs_dir) for agent_id in ("ann", "bob", "eve"))
    job = Job(kind="round", name="round-0001", round=1, run=run, device="cpu", initial_weights=None)
    job = job.model_copy(update={"contributions": contributions})
    result = done(job, tmp_path / "first", blobs_dir)
    assert done(job, tmp_path / "again", blobs_dir).weights == result.weights
    assert result.metric == task_of(run).metric
    assert result.score_published is not None
    assert result.score_published > least
    assert set(result.candidates) == {"aligned", "average", "greedy_soup", "best_agent"}
    # The sizes of updates are compared for every task, labels and models for classification alone.
    assert len(result.audit) == 3
    is_audited = run.task == "classification"
    assert ("not audited" in result.audit_note) is not is_audited
    assert all((agent.label_share is not None) is is_audited for agent in result.audit)
    assert len(result.classes) == (0 if run.task == "regression" else run.spec.num_classes)
    assert set(result.figures) == ({"mean_absolute_error"} if run.task == "regression" else set())


def pass_gate(path: Path, spec: DatasetSpec) -> None:
    """Do what the server does with a shard: check its header, then its values."""
    header = read_header(path)
    check_shard(header, spec)
    check_examples(path, header, spec)


FLOATS, NUMBERS = np.zeros((3, 4), np.float32), np.full((3, 1), 50, np.float32)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (FLOATS[:, :3], NUMBERS, r"inputs is F32 \[3, 3\], the run's dataset wants F32 \[3, 4\]"),
        (FLOATS.astype(np.uint8), NUMBERS, r"inputs is U8 \[3, 4\]"),
        (FLOATS, NUMBERS[:, 0], r"targets is F32 \[3\], not F32 \[N, 1\]"),
        (FLOATS, NUMBERS.astype(np.int64), r"targets is I64 \[3, 1\]"),
        (FLOATS + np.nan, NUMBERS, "inputs has the value nan, which is no finite number"),
        (FLOATS, NUMBERS * np.inf, "targets has the value inf"),
        (FLOATS - 11, NUMBERS, "inputs has the value -11, the run's dataset has -10 to 10"),
        (FLOATS, NUMBERS * 3, "targets has the value 150, the run's dataset has 0 to 100"),
    ],
)
def test_gate_refuses_what_the_run_does_not_describe(
    inputs: np.ndarray, targets: np.ndarray, message: str, tmp_path: Path
) -> None:
    spec, path = CASES["regression"][0].spec, tmp_path / "shard"
    write_shard(path, Shard(inputs, targets))
    with pytest.raises(InvalidError, match=message) as refused:
        pass_gate(path, spec)
    assert refused.value.reason is Reason.INVALID_SHARD


def test_agent_keeps_its_model_where_the_global_one_has_larger_errors(tmp_path: Path) -> None:
    run = CASES["regression"][0].model_copy(update={"adapt_epochs": 0})
    disk = AgentState(tmp_path / "agent", "edge-1")
    local = LocalModels(run, AgentData(regression(), regression(), 0), disk, CPU, [], 60)
    trained = local.keep(1, None, local.pretrain(1, None, lambda _: None))
    strange = build_model(run, seed=7)
    write_state_dict(strange.state_dict(), tmp_path / "strange")
    report = local.measure(1, tmp_path / "strange", trained, lambda _: None)
    assert (report.applied, report.score_before) == (False, trained.score)
    assert report.reason.startswith(f"R² {trained.score:.4f} → {report.score_after:.4f} on 120 held-out")
    same = local.measure(1, disk.model, trained, lambda _: None)
    assert (same.applied, same.score_after) == (True, trained.score)
    disk.close()
