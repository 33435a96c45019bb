"""Trainings of every task that are cut off amid an epoch: whoever goes on ends with the same bytes."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ecavg.cloud_server.jobs import Job, JobDirectory
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.config import RunConfig
from ecavg.common.faults import Point
from ecavg.common.shards import Shard
from ecavg.common.training import StepReport
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.state import AgentState
from tests.integration.test_tasks import CASES, NUM_EXAMPLES, OWN, TRAINED, contributed, done
from tests.processes import ROOT
from tests.recipes import CPU

Case = tuple[RunConfig, Shard]


class CutOffError(BaseException):
    """A process is killed: nothing in it can catch this."""


def labelled_pictures() -> Shard:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, NUM_EXAMPLES)
    pixels = rng.integers(0, 128, (NUM_EXAMPLES, 1, 4, 4)) + 100 * labels[:, None, None, None]
    return Shard(pixels.astype(np.uint8), labels)


def two_heads() -> Case:
    shard = Shard(*importlib.import_module("two_heads").windows("train"))
    run = RunConfig(
        task="two_heads:TwoHeads",
        model="two_heads:net",
        dataset="vibration",
        inputs={"shape": (1, 32)},
        targets={"shape": (2,), "low": 0, "high": 1},
        pretrain=TRAINED,
        fine_tune=TRAINED,
    )
    return run, shard


def classification() -> Case:
    return RunConfig(**OWN, num_classes=2, image_shape=(1, 4, 4)), labelled_pictures()


def case_of(name: str) -> Case:
    run, make, _ = CASES[name]
    return run, make()


MAKE: dict[str, Callable[[], Case]] = {
    "classification": classification,
    "multi-label": lambda: case_of("multi-label"),
    "regression": lambda: case_of("regression"),
    "segmentation": lambda: case_of("segmentation"),
    "own": two_heads,
}


@pytest.fixture(params=MAKE)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("ecavg.common.training.REPORT_SECONDS", 0.0)
    made = MAKE[request.param]()
    # Each step is said, and none is timed.
    changes = {"precision": "float32"}
    run = made[0]
    return run.model_copy(
        update={
            "pretrain": run.pretrain.model_copy(update=changes),
            "fine_tune": run.fine_tune.model_copy(update=changes),
        }
    ), made[1]


def digest_of(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def pretrained(run: RunConfig, shard: Shard, folder: Path, on_step: Callable[[StepReport], None]) -> str:
    """Return the digest of what an agent pre-trains that keeps a checkpoint of each epoch."""
    disk = AgentState(folder, "edge-1")
    try:
        local = LocalModels(run, AgentData(shard, shard, 0), disk, CPU, [run.task, run.model], 0.0)
        return digest_of(local.pretrain(1, None, on_step).state_dict())
    finally:
        disk.close()


@pytest.mark.parametrize("cut_epoch", [1, 3])
def test_agent_that_is_cut_off_pretrains_to_the_same_bytes(
    cut_epoch: int, case: Case, tmp_path: Path
) -> None:
    steps: list[int] = []
    undisturbed = pretrained(*case, tmp_path / "undisturbed", lambda report: steps.append(report.step))
    an_epoch = len(steps) // case[0].pretrain.epochs

    def die(report: StepReport) -> None:
        if report.step == cut_epoch * an_epoch + 2:
            raise CutOffError

    with pytest.raises(CutOffError):
        pretrained(*case, tmp_path / "cut", die)
    torch.manual_seed(cut_epoch)
    steps.clear()
    assert pretrained(*case, tmp_path / "cut", lambda report: steps.append(report.step)) == undisturbed
    # The finished epochs are not done again.
    assert steps[0] == cut_epoch * an_epoch + 1


def test_fine_tune_that_is_cut_off_publishes_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shard = case
    blobs_dir = tmp_path / "blobs"
    blobs_dir.mkdir()
    contributions = tuple(contributed(run, shard, agent_id, blobs_dir) for agent_id in ("ann", "bob"))
    job = Job(kind="round", name="round-0001", round=1, run=run, device="cpu", initial_weights=None)
    job = job.model_copy(update={"contributions": contributions})
    undisturbed = done(job, tmp_path / "undisturbed", blobs_dir)

    # So many of the steps are in the first two epochs: the process dies in the third.
    num_steps = 2 * len(range(0, 2 * len(shard.targets) * 9 // 10, run.fine_tune.batch_size)) + 2
    arrivals: list[Point] = []

    def die(point: Point) -> None:
        arrivals.append(point)
        if arrivals.count(Point.TRAINER_STEP_DONE) == num_steps:
            raise CutOffError

    directory = JobDirectory(tmp_path / "cut" / "jobs" / job.name)
    directory.write_job(job)

    def work_on_it() -> None:
        # Each epoch is kept.
        work.run_job(directory, blobs_dir=blobs_dir, device_name="cpu", group=Group(), checkpoint_seconds=0.0)

    with monkeypatch.context() as patched:
        patched.setattr("ecavg.cloud_server.trainer.pipeline.crash_point", die)
        with pytest.raises(CutOffError):
            work_on_it()
    assert Point.TRAINER_FINE_TUNED not in arrivals
    assert directory.read_result() is None
    torch.manual_seed(9)
    work_on_it()
    again = directory.read_result()
    assert again
    assert again.weights == undisturbed.weights
    assert again.score_published == undisturbed.score_published
    # The finished epochs are not done again.
    steps = [each.done for each in directory.read_progress(0)[0] if each.phase == "fine_tuning" and each.done]
    assert steps[0] == num_steps - 1
