"""The images and the stack of containers: who they run as, what they hold, what is switched on."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.processes import ROOT

STACK: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text("utf-8")


def stages() -> dict[str, str]:
    """Return the text of each stage of the Dockerfile by its name."""
    found = re.split(r"^FROM \S+ AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_images_install_nothing_and_run_as_a_user_without_rights() -> None:
    found = stages()
    assert list(found) == ["build", "runtime", "server", "agent"]
    assert "\nUSER ecavg\n" in found["runtime"]
    for name in ("runtime", "server", "agent"):
        assert not re.search(r"\b(pip|apt-get|USER root)\b", found[name]), name
    assert "pip uninstall" in found["build"]


def test_pytorch_is_that_for_cpus_unless_another_index_is_named() -> None:
    assert "\nARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu\n" in DOCKERFILE
    assert SERVICES["trainer"]["build"]["args"] == {"TORCH_INDEX_URL": ""}


def test_what_needs_a_profile_is_not_started_without_it() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {
        "trainer": ["gpu"],
        "rendezvous": ["trainers"],
        "rank": ["trainers"],
        "grafana": ["grafana"],
    }


def test_trainer_with_gpus_works_on_the_servers_state_and_the_server_has_none() -> None:
    trainer, server = SERVICES["trainer"], SERVICES["cloud-server"]
    assert "cloud-server:/state" in trainer["volumes"]
    (device,) = trainer["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    # The one variable says both that the server leaves the training to others, and that they may do it.
    variable = "${ECAVG_TRAINERS:-own}"
    assert trainer["environment"]["ECAVG_SERVER_TRAINERS"] == variable
    assert server["environment"]["ECAVG_SERVER_TRAINERS"] == variable


def test_agents_that_are_scaled_share_nothing_but_tokens() -> None:
    agent = SERVICES["edge-agent"]
    assert agent["deploy"]["replicas"] == 0
    # No id and no named volume, so that each container has its own.
    assert "--agent-id" not in agent["command"]
    assert {volume.split(":")[0] for volume in agent["volumes"]} == {"join", "scrape"}
    assert "\nVOLUME /state\n" in DOCKERFILE
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text("utf-8"))
    (job,) = [each for each in prometheus["scrape_configs"] if each["job_name"] == "edge-agent"]
    assert job["dns_sd_configs"][0]["names"] == ["edge-agent"]


def test_volumes_are_declared_and_files_that_are_mounted_exist() -> None:
    mounts = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    assert {each for each in mounts if not each.startswith(("/", "."))} == set(STACK["volumes"])
    assert all(Path(ROOT, each).exists() for each in mounts if each.startswith("."))
