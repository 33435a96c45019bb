"""The checks of both doctors, one by one, where there is no server: what each of them says."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ecavg.cloud_server.commands import doctor as server_doctor
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.config import FineTuneConfig
from ecavg.common.doctor import Check
from ecavg.common.errors import ECAvgError, RunError
from ecavg.common.sharded import write_sharded
from ecavg.edge_agent import doctor as agent_doctor
from ecavg.edge_agent.config import AgentConfig
from tests.processes import enroll


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Yield a port on which nobody listens, and which nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def agent_config(folder: Path, port: int, **keys: object) -> AgentConfig:
    return AgentConfig(server=f"127.0.0.1:{port}", state_dir=folder, **keys)  # type: ignore[arg-type]


def said(checks: dict[str, Check], name: str) -> str:
    """Return what a check says, whether all is well or not."""
    try:
        return "ok " + checks[name]()
    except ECAvgError as error:
        return "wrong " + str(error)


def test_agent_without_a_server_is_told_so_and_the_rest_is_looked_at(
    tmp_path: Path, closed_port: int
) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    enroll(tmp_path / "server", tmp_path / "agent", "edge-1")
    config = agent_config(tmp_path / "agent", closed_port, data=str(tmp_path / "images"), device="cpu")
    checks = agent_doctor.checks(config)
    assert said(checks, "name").startswith("ok ")
    assert said(checks, "port").startswith(f"wrong nobody answers at 127.0.0.1:{closed_port} (")
    assert said(checks, "identity").startswith("ok enrolled as edge-1, ")
    assert said(checks, "tls").startswith("wrong ")
    assert said(checks, "state").startswith("ok ")
    assert said(checks, "data") == f"ok {tmp_path / 'images'} has 2 images of 2 classes"
    assert said(checks, "device").startswith("ok ")


def test_agent_that_has_not_enrolled_is_told_how(tmp_path: Path, closed_port: int) -> None:
    checks = agent_doctor.checks(agent_config(tmp_path / "agent", closed_port))
    assert "enroll" in said(checks, "identity")
    assert said(checks, "identity").startswith("wrong ")
    checks = agent_doctor.checks(agent_config(tmp_path / "agent", closed_port, insecure=True))
    assert said(checks, "identity").startswith("ok ")
    assert said(checks, "tls").startswith("wrong ")


def test_data_and_device_that_are_not_there_are_told(tmp_path: Path, closed_port: int) -> None:
    (tmp_path / "images/train").mkdir(parents=True)
    config = agent_config(tmp_path, closed_port, data=str(tmp_path / "images"), device="cuda:99")
    checks = agent_doctor.checks(config)
    assert said(checks, "data").startswith("wrong ")
    assert said(checks, "device").startswith("wrong device 'cuda:99' is not there")


def test_server_that_lacks_nothing_is_well_and_makes_nothing(tmp_path: Path) -> None:
    checks = server_doctor.checks(ServerConfig(state_dir=tmp_path / "new", port=0, http_port=0))
    for name in ("configuration", "port", "page", "state", "disk", "tls"):
        assert said(checks, name).startswith("ok "), name
    assert not (tmp_path / "new").exists()


def test_port_in_use_and_a_ca_without_its_key_are_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, closing(Authority(StateDir(tmp_path).tls)):
        port = taken.getsockname()[1]
        checks = server_doctor.checks(ServerConfig(state_dir=tmp_path, host="127.0.0.1", port=port))
        assert said(checks, "port").startswith("wrong nobody can listen on ")
        assert said(checks, "tls").startswith("ok ")
        next(StateDir(tmp_path).tls.glob("ca*key*")).unlink()
        assert said(checks, "tls").startswith("wrong ")


def test_model_that_is_only_averaged_is_not_built(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}, tmp_path / "whole")
    index = tmp_path / "model.safetensors.index.json"
    write_sharded(tmp_path / "whole", index, 20)
    averaging = {
        "model": "no-such-model",
        "initial_weights": str(index),
        "candidates": ("average",),
        "fine_tune": FineTuneConfig(epochs=0),
    }
    run = ServerConfig().run.model_copy(update=averaging)
    checks = server_doctor.checks(ServerConfig(state_dir=tmp_path).model_copy(update={"run": run}))
    assert checks["trainer"]().endswith(
        "; initial weights of 15 numbers, which are averaged without the model"
    )
    index.unlink()
    with pytest.raises(RunError, match=r"run\.initial_weights: cannot read"):
        checks["trainer"]()


def test_model_that_cannot_be_built_is_told_by_the_trainer(tmp_path: Path) -> None:
    run = ServerConfig().run.model_copy(update={"model": "no-such-model"})
    checks = server_doctor.checks(ServerConfig(state_dir=tmp_path).model_copy(update={"run": run}))
    with pytest.raises(RunError, match="no-such-model"):
        checks["trainer"]()
