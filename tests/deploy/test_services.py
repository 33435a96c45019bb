"""What the units and the stack promise: restarts, hardening, who reads whose keys."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ecavg.cloud_server.trainer import __main__ as trainer_main
from ecavg.cloud_server.trainer.group import OWN_STORE

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(ROOT / "deploy/systemd/cloud-server.service", "utf-8")
    return parser


def test_server_outlives_a_trainer_that_ran_out_of_memory(unit: configparser.ConfigParser) -> None:
    assert unit["Service"]["OOMPolicy"] == "continue"


def test_server_that_always_fails_is_given_up(unit: configparser.ConfigParser) -> None:
    burst, interval = int(unit["Unit"]["StartLimitBurst"]), int(unit["Unit"]["StartLimitIntervalSec"])
    assert 1 < burst <= 5
    assert interval >= 10 * burst * int(unit["Service"]["RestartSec"])  # it takes seconds to fail as well
    stack = (ROOT / "docker-compose.yml").read_text("utf-8")
    assert re.search(r"^    restart: on-failure:[1-9]\b", service(stack, "cloud-server"), re.MULTILINE)


def test_no_agent_of_the_stack_can_read_the_servers_keys() -> None:
    stack = (ROOT / "docker-compose.yml").read_text("utf-8")
    holders = [
        name
        for name in (
            "tokens",
            "cloud-server",
            "trainer",
            "rank",
            "edge-1",
            "edge-2",
            "edge-agent",
            "prometheus",
        )
        if "cloud-server:/state" in service(stack, name)
    ]
    assert holders == ["tokens", "cloud-server", "trainer", "rank"]
    assert "/join" not in service(stack, "prometheus")
    assert "insecure" not in stack


def test_ranks_of_the_stack_meet_where_the_rendezvous_is() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    rank, rendezvous = services["rank"], services["rendezvous"]
    launcher = get_args_parser().parse_args(rank["command"])
    assert launcher.rdzv_endpoint == f"rendezvous:{rendezvous['command'][-1]}"
    assert launcher.training_script == "ecavg.cloud_server.trainer"
    assert trainer_main._parser().parse_args(launcher.training_script_args).state_dir == Path("/state")
    assert rank["environment"][OWN_STORE] == "1"
    # Without the profile the server trains by itself.
    assert services["cloud-server"]["environment"]["ECAVG_SERVER_TRAINERS"] == "${ECAVG_TRAINERS:-own}"
    assert rank["profiles"] == rendezvous["profiles"] == ["trainers"]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_has_nothing_to_say_of_the_units(unit: Path, tmp_path: Path) -> None:
    program = re.search(r"^ExecStart=(\S+)", unit.read_text("utf-8"), re.MULTILINE)
    assert program
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text("utf-8").replace(program[1], "/bin/true"), "utf-8")
    found = subprocess.run(["systemd-analyze", "verify", copy], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_are_as_hardened_as_the_documentation_says(unit: Path) -> None:
    # The threshold is ten times the exposure.
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def service(stack: str, name: str) -> str:
    found = re.search(rf"^  {name}:(?: &\w+)?$(.*?)(?=^  \S|^\S)", stack, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]
