"""What users get wrong, through the real command line: one line that names it, and exit code 2."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import ROOT, Cluster

SERVER = ("ecavg.cloud_server",)
AGENT = ("ecavg.edge_agent", "--server", "127.0.0.1:1")


def run(*args: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code, and the one line that it must have printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--preset", "mnist"),
            "unknown preset 'mnist': choose breast-cancer-mlp, cifar10-mobilenetv2, cifar10-",
        ),
        (("--set", "run.dataset=mnits"), "unknown dataset 'mnits': choose digits, mnist"),
        (("--set", "run.sead=3"), "unknown key 'run.sead' (from the command line)"),
        (("--set", "run.pretrain.epochs=x"), "run.pretrain.epochs: should be a valid integer"),
        (("--set", "run.partition_by=dirichlet:0"), "run.partition_by: choose \"iid\""),
        (("--set", "run.max_norm_ratio=0.5"), "run.max_norm_ratio: choose 1 or more, or 0 for no limit"),
        (("--set", "seed"), "--set seed: write KEY=VALUE"),
        (("--min-agents", "0"), "min_agents: should be greater than or equal to 1, not '0'"),
        (("--min-agents", "3", "--max-agents", "2"), "max_agents 2 is below min_agents 3"),
        (("--port", "99999"), "port: should be less than or equal to 65535, not '99999'"),
        (("--deadline-seconds", "soon"), "deadline_seconds: should be a valid number"),
        (("--config", "nowhere.toml"), "cannot read configuration file nowhere.toml: No such file"),
    ],
)  # fmt: skip
def test_wrong_server_configuration_is_named(args: tuple[str, ...], message: str) -> None:
    code, text = run(*SERVER, *args)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--partition", "3/2"), "partition '3/2'"),
        (("--partition", "one"), "partition 'one'"),
        (("--metrics-port", "99999"), "metrics_port: should be less than or equal to 65535"),
        (("--server", "nowhere"), "server: should be HOST:PORT"),
        (("--agent-id", "../x"), "agent_id: should be 1 to 64 letters"),
        (("--data", "no/such/folder"), "data source 'no/such/folder' is neither a folder nor a dataset"),
        (("--data", "mnits"), "data source 'mnits' is neither a folder nor a dataset"),
        (("--data", "mnist", "--data-dir", "nowhere"), "data folder nowhere does not exist"),
        (("--config", "nowhere.toml"), "cannot read configuration file nowhere.toml: No such file"),
    ],
)
def test_wrong_agent_configuration_is_named(args: tuple[str, ...], message: str) -> None:
    code, text = run(*AGENT, *args)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


def test_unknown_flags_are_named() -> None:
    code, text = run(*SERVER, "--prot", "1")
    assert code == 2
    assert "--prot" in text


def test_unknown_keys_of_file_and_environment_are_named(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("min_agent = 3\n", "utf-8")
    assert run(*SERVER, "--config", file) == (2, f"cloud-server: unknown key 'min_agent' (from {file})\n")
    code, text = run(*SERVER, env={"ECAVG_SERVER_MIN_AGENT": "3"})
    assert (code, "ECAVG_SERVER_MIN_AGENT" in text) == (2, True)


def test_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("min_agents: 3\n", "utf-8")
    code, text = run(*SERVER, "--config", file)
    assert code == 2
    assert f"configuration file {file} is not TOML" in text


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        grpc = ("--host", "127.0.0.1", "--port", port, "--http-port", 0)
        http = ("--host", "127.0.0.1", "--port", 0, "--http-port", port)
        for ports in (grpc, http):
            code, text = run(*SERVER, *ports, "--state-dir", tmp_path / "state")
            assert code == 2
            assert f"cannot listen on 127.0.0.1:{port}" in text


@pytest.mark.parametrize("command", [SERVER, AGENT])
def test_state_directory_that_cannot_be_written_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "file"
    file.touch()
    code, text = run(*command, "--state-dir", file / "state")
    assert code == 2
    assert f"{file / 'state'}" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "run.model=resnet51"), "unknown model 'resnet51'"),
        (("--set", "run.model=resnet18"), "resnet18"),  # one channel, and it wants three
        (("--set", "run.model=tests.integration.models:five_classes"), "5"),
    ],
)
def test_model_that_does_not_fit_is_named(cluster: Cluster, args: tuple[str, ...], message: str) -> None:
    server = cluster.server(*args, ready=False)
    assert server.wait() == 2
    last_line = server.output.strip().splitlines()[-1]
    assert last_line.startswith("cloud-server: ")
    assert message in last_line
    assert "Traceback" not in server.output


def test_data_folders_that_cannot_be_used_are_named(cluster: Cluster, tmp_path: Path) -> None:
    """Missing, empty, without class folders, and with nothing that can be read."""
    cluster.server("--min-agents", 1)
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    cases = [("empty", "class folders")]
    (folder / "no-classes/train").mkdir(parents=True)
    (folder / "no-classes/train/image.png").touch()
    cases.append(("no-classes", "class folders"))
    for label in range(10):
        (folder / f"unreadable/train/{label}").mkdir(parents=True)
        (folder / f"unreadable/train/{label}/image.png").write_bytes(b"no image")
    cases.append(("unreadable", "none of its images can be read"))
    (folder / "empty/train").mkdir(parents=True)
    for name, message in cases:
        agent = cluster.agent(name, "--data", folder / name)
        assert agent.wait() == 2
        assert message in agent.output.strip().splitlines()[-1]


def test_unreadable_image_is_skipped_and_counted(cluster: Cluster, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / f"images/train/{label}"
        folder.mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "images/train/0/broken.png").write_bytes(b"no image")
    server = cluster.server("--min-agents", 1)
    agent = cluster.agent("edge-1", "--data", tmp_path / "images")
    assert agent.wait() == 0
    assert "broken.png" in agent.output
    assert server.wait() == 0
    own = json.loads((cluster.folder / "edge-1/report.json").read_text("utf-8"))
    assert cluster.report()["agents"][0]["num_examples"] + own["num_held_out"] == 30
