"""An agent whose labels are wrong, among honest ones: real processes, and what is known of it afterwards."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from ecavg.cloud_server.jobs import JobDirectory
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.work import run_job
from tests.processes import Cluster

HONEST, POISONED = ("edge-1", "edge-2", "edge-3"), "edge-4"


def fetched(cluster: Cluster, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}{path}") as reply:
        text: str = reply.read().decode()
    return text


def test_poisoned_agent_is_flagged_everywhere_and_the_model_is_as_without_it(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cluster.server(
        "--min-agents", 4, "--rounds", 0, "--set", "run.quarantine=exclude", "--agent-labels"
    )
    agents = [cluster.agent(name, "--partition", f"{number}/4") for number, name in enumerate(HONEST, 1)]
    flipped = "tests.integration.sources:flipped_digits"
    poisoned = cluster.agent(POISONED, "--data", flipped, "--partition", "4/4")
    poisoned.wait_for("round 1: contribution left out: its labels contradict those of the others")
    agents[0].wait_for("round 1: accuracy before")

    status = json.loads(fetched(cluster, "/api/status"))
    shown = {agent["agent_id"]: agent["audit"] for agent in status["agents"]}
    assert shown[POISONED]["flags"][0] == "labels"
    assert shown[POISONED]["left_out"] == "quarantined"
    assert [shown[name]["flags"] for name in HONEST] == [[], [], []]
    assert status["rounds"][0]["flagged"] == [POISONED]
    found = re.findall(
        r'^ecavg_server_agent_flagged{agent_id="(\S+)"} (\S+)$', fetched(cluster, "/metrics"), re.M
    )
    assert found == [*((name, "0.0") for name in HONEST), (POISONED, "1.0")]
    assert server.terminate() == 0

    report = cluster.report()
    assert {agent["agent_id"] for agent in report["audit"] if agent["flags"]} == {POISONED}
    left_out = {agent["agent_id"]: agent.get("left_out") for agent in report["agents"]}
    assert left_out[POISONED]["reason"] == "quarantined"
    assert [left_out[name] for name in HONEST] == [None, None, None]
    (line,) = [
        line
        for line in lines_of(server.output)
        if line.get("event") == "agent_flagged" and line["round"] == 1
    ]
    assert (line["agent_id"], line["level"], line["left_out"]) == (POISONED, "warning", "quarantined")
    assert not any("left out" in agent.output for agent in agents)

    # The same round, had the poisoned agent never been there.
    torch.set_num_threads(1)
    job = JobDirectory(cluster.state_dir / "jobs/round-0001").read_job()
    without = [item for item in job.contributions if item.agent_id != POISONED]
    assert len(without) == 3
    directory = JobDirectory(tmp_path / "jobs/without")
    directory.write_job(job.model_copy(update={"name": "without", "contributions": tuple(without)}))
    run_job(directory, blobs_dir=cluster.state_dir / "blobs", device_name="cpu", group=Group())
    result = directory.read_result()
    assert result
    assert result.weights
    assert result.weights.sha256 == report["weights"]["sha256"]


def lines_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
