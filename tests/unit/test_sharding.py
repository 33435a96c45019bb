"""Models that the ranks have a part of each: what is trained and measured is what whole models give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.models import build_model
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import blob_of
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.unit.rank_processes import run_ranks

RTOL, ATOL = 1e-4, 1e-5
FINE_TUNE = FineTuneConfig(epochs=2, batch_size=64, learning_rate=0.05)
RUN = RunConfig(hidden_units=33, fine_tune=FINE_TUNE)


def put(path: Path, blobs_dir: Path) -> str:
    digest = blob_of(path).digest
    blob_path(blobs_dir, digest).parent.mkdir(parents=True, exist_ok=True)
    path.rename(blob_path(blobs_dir, digest))
    return digest


def contribution(run: RunConfig, number: int, blobs_dir: Path) -> Contribution:
    """Return that of an agent with 200 digits of its own, and with random weights."""
    bunch, mine = load_digits(), slice(200 * number, 200 * (number + 1))
    write_state_dict(build_model(run, seed=number).state_dict(), blobs_dir / "new")
    weights = put(blobs_dir / "new", blobs_dir)
    images = (bunch.images[mine] * (255 / 16)).astype(np.uint8)[:, None]
    write_shard(blobs_dir / "new", Shard(images, bunch.target[mine].astype(np.int64)))
    return Contribution(f"agent-{number}", weights, (put(blobs_dir / "new", blobs_dir),), 200)


def prepare(run: RunConfig, parallel: str, folder: Path, num_agents: int = 3) -> JobDirectory:
    """Write the job of a round to the folder."""
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    contributions = tuple(contribution(run, number, folder / "blobs") for number in range(num_agents))
    fine_tune = run.fine_tune.model_copy(update={"parallel": parallel})
    run = run.model_copy(update={"fine_tune": fine_tune})
    directory = JobDirectory(folder / "job")
    directory.write_job(
        Job(kind="round", name="job", round=1, run=run, device="cpu", initial_weights=None,
            contributions=contributions)
    )  # fmt: skip
    return directory


def work_as_rank(rank: int, world_size: int, *folders: Path) -> None:
    """Do the part of one of the ranks in the round of each folder."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folders[0]}/rendezvous", rank=rank, world_size=world_size
    )
    group = Group(rank, world_size, rank)
    for folder in folders:
        directory = JobDirectory(folder / "job")
        work.run_job(directory, blobs_dir=folder / "blobs", device_name="cpu", group=group)
    torch.distributed.destroy_process_group()


SCRIPT = """
import sys
from pathlib import Path
from tests.unit.test_sharding import work_as_rank
work_as_rank(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:]))
"""


def test_round_of_sharded_ranks_is_that_of_whole_models(tmp_path: Path) -> None:
    sharded = prepare(RUN, "fsdp", tmp_path / "fsdp")
    whole = prepare(RUN, "ddp", tmp_path / "ddp")
    run_ranks(SCRIPT, 2, tmp_path / "fsdp", tmp_path / "ddp")
    assert_alike(sharded, whole)


def assert_alike(found: JobDirectory, expected: JobDirectory) -> None:
    results = [result_of(found), result_of(expected)]
    for name in ("start", "published", "soup", "metric"):
        assert getattr(results[0], name) == getattr(results[1], name), name
    for name in ("candidates", "score_published", "score_fine_tuned"):
        assert getattr(results[0], name) == pytest.approx(getattr(results[1], name), abs=0.01), name
    weights = [read_state_dict(directory.weights_path) for directory in (found, expected)]
    for name in weights[1]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=RTOL, atol=ATOL)


def result_of(directory: JobDirectory) -> Result:
    result = directory.read_result()
    assert result
    assert result.error is None
    return result
