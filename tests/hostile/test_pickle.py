"""Bytes that run code in whoever unpickles them, wherever something of ours reads bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ecavg.cloud_server.jobs import JobDirectory
from ecavg.common import precision
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import InvalidError, Reason, RunError, UsageError
from ecavg.common.models import build_model
from ecavg.common.schema import read_header
from ecavg.common.shards import read_shard
from ecavg.common.training import Examples, train
from ecavg.common.weights import load_into, read_state_dict
from ecavg.common.wire import decode
from ecavg.edge_agent.state import AgentState
from tests.hostile.pickles import UNPICKLE
from tests.hostile.target import Agent, Target, digest_of, refusal_of
from tests.recipes import recipe_of

every_kind = pytest.mark.parametrize("make", UNPICKLE, ids=lambda make: make.__name__)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "somebody-unpickled-this"


@every_kind
def test_bombs_are_real(make: Any, marker: Path) -> None:
    UNPICKLE[make](make(marker))
    assert marker.exists()


@every_kind
@pytest.mark.parametrize("kind", ["weights", "data"])
def test_pickle_is_neither_weights_nor_data(
    target: Target, attacker: Agent, make: Any, kind: str, marker: Path
) -> None:
    content = make(marker)
    assert refusal_of(lambda: attacker.upload(content, kind)).reason is Reason.INVALID_FILE
    assert attacker.query(digest_of(content), kind) == (0, False)
    assert not marker.exists()


@every_kind
def test_pickle_is_no_file_of_weights_or_data(make: Any, marker: Path, tmp_path: Path) -> None:
    """Nor where it lies on the disk already: as weights to start from, a shard, a blob, something encoded."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(make(marker))
    for read in (read_header, read_shard, lambda path: decode(path, tmp_path / "decoded")):
        with pytest.raises(InvalidError) as refused:
            read(path)
        assert refused.value.reason is Reason.INVALID_FILE
    model = build_model(RunConfig(), seed=0)
    for load in (read_state_dict, lambda path: load_into(model, path)):
        with pytest.raises(RunError, match="not a usable safetensors file"):
            load(path)
    assert not marker.exists()


@every_kind
def test_pickle_is_no_checkpoint(make: Any, marker: Path, tmp_path: Path) -> None:
    """It is passed over, and the training begins anew: with the same result as if there had been none."""
    run = RunConfig()
    images = torch.arange(8 * 64, dtype=torch.uint8).reshape(8, 1, 8, 8)

    def trained(checkpoint: Path) -> list[torch.Tensor]:
        model = build_model(run, seed=0)
        train(
            model,
            Examples(images, torch.arange(8)),
            recipe_of(run, 1, TrainingConfig(epochs=1)),
            device=torch.device("cpu"),
            checkpoint=CheckpointFile(checkpoint),
        )
        return list(model.parameters())

    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(make(marker))
    for ours, undisturbed in zip(trained(checkpoint), trained(tmp_path / "none"), strict=True):
        assert torch.equal(ours, undisturbed)
    assert not marker.exists()


@every_kind
def test_pickle_is_no_job(make: Any, marker: Path, tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path / "jobs/round-0001")
    directory.path.mkdir(parents=True)
    for name in ("job.json", "result.json", "progress.jsonl"):
        (directory.path / name).write_bytes(make(marker))
    for read in (directory.read_job, directory.read_result):
        with pytest.raises(RunError, match="is damaged"):
            read()
    assert directory.read_progress(0)[0] == []
    assert not marker.exists()


@every_kind
@pytest.mark.parametrize("name", ["progress.json", "agent-id"])
def test_pickle_is_no_state_of_an_agent(make: Any, name: str, marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / name).write_bytes(make(marker))
    with pytest.raises(UsageError, match=r"remove .* to start afresh|is not UTF-8 text"):
        AgentState(folder, None)
    assert not marker.exists()


@every_kind
def test_pickle_is_no_measurement_of_precision(make: Any, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    path.write_bytes(make(marker))
    assert precision._read(path) is None
    assert not marker.exists()
