"""`cloud-server forget` between real processes: what is gone, what stays, and who goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.jobs import JobDirectory
from tests.integration.test_data_travel_once import next_rounds
from tests.integration.test_round import get
from tests.integration.test_sharing import agent, contents_of, images_in
from tests.processes import Cluster, until

QUICK = ("--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")


def provenance(state_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state_dir / "provenance.jsonl").read_text("utf-8").splitlines()]


def progress(cluster: Cluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cluster.folder / name / "progress.json").read_text("utf-8"))
    return found


def check_forgotten(cluster: Cluster, name: str, said: str) -> list[int]:
    """Nothing of the agent is left but its revocation; the rounds whose models had used its data."""
    for image in images_in(cluster.folder / name / "shards"):
        assert image not in contents_of(cluster.state_dir)
    naming = [
        path
        for path in cluster.state_dir.rglob("*")
        if path.is_file() and "tls" not in path.parts and name.encode() in path.read_bytes()
    ]
    assert naming == []
    entries = provenance(cluster.state_dir)
    (forgotten,) = (entry for entry in entries if "forgotten" in entry)
    assert forgotten["forgotten"] in said
    for model in forgotten["models"]:
        assert f"round {model['round']}: {model['model']}" in said
        assert (cluster.state_dir / f"blobs/{model['model'][:2]}/{model['model']}").exists()
    rounds = [model["round"] for model in forgotten["models"]]
    for entry in entries:
        if "round" in entry:
            ids = [item["agent_id"] for item in entry["contributions"]]
            assert (forgotten["forgotten"] in ids) == (entry["round"] in rounds)
    return rounds


def test_agent_is_forgotten_while_the_server_runs(cluster: Cluster) -> None:
    server = cluster.server("--rounds", 0, "--min-agents", 2, "--max-agents", 2, *QUICK)
    edge_1, edge_2 = (agent(cluster, number, 3, "all") for number in (1, 2))
    next_rounds(cluster, server)
    forgetting = cluster.forget("edge-2")
    assert forgetting.wait() == 0, forgetting.output
    assert edge_2.wait() == 1
    assert "has been revoked" in edge_2.output
    rounds = check_forgotten(cluster, "edge-2", forgetting.output)
    assert rounds[:2] == [1, 2]
    assert edge_1.process.poll() is None
    assert [each["agent_id"] for each in cluster.report(1)["agents"]] == ["edge-1"]
    assert (again := cluster.forget("edge-2")).wait() == 0, again.output  # it changes nothing
    assert "nothing of it is kept here" in again.output
    nobody = cluster.forget("nobody")
    assert nobody.wait() == 2
    assert nobody.output.startswith("cloud-server: there is no agent 'nobody'")
    assert len(nobody.output.splitlines()) == 1

    edge_3 = agent(cluster, 3, 3, "all")
    next_rounds(cluster, server)
    for command in (edge_1, edge_3, server):
        assert command.terminate() == 0
    check_forgotten(cluster, "edge-2", forgetting.output)
    assert main(["check", str(cluster.state_dir)]) == 0


@pytest.mark.soak
def test_agent_is_forgotten_while_the_server_is_stopped_and_comes_back_anew(cluster: Cluster) -> None:
    settings = ("--min-agents", 2, *QUICK)
    server = cluster.server("--rounds", 1, *settings)
    agents = [agent(cluster, number, 2, "all") for number in (1, 2)]
    assert [each.wait() for each in agents] == [0, 0]
    assert server.wait() == 0
    forgetting = cluster.forget("edge-2")
    assert forgetting.wait() == 0, forgetting.output
    assert check_forgotten(cluster, "edge-2", forgetting.output) == [1]
    assert main(["check", str(cluster.state_dir)]) == 0
    assert cluster.report(1)["num_shared"] > 0

    server = cluster.server("--rounds", 2, *settings)
    edge_1 = agent(cluster, 1, 2, "all")
    assert agent(cluster, 2, 2, "all").wait() == 1  # it cannot just come back
    (cluster.folder / "edge-2/tls/identity.pem").unlink()
    cluster.enroll("edge-2")  # with a newer token it can
    assert agent(cluster, 2, 2, "all").wait() == edge_1.wait() == server.wait() == 0
    assert [each["agent_id"] for each in cluster.report(2)["agents"]] == ["edge-1", "edge-2"]
    assert main(["check", str(cluster.state_dir)]) == 0


@pytest.mark.soak
def test_agent_that_is_forgotten_contributes_to_the_same_round_when_it_comes_back(cluster: Cluster) -> None:
    server = cluster.server("--rounds", 1, "--min-agents", 2, *QUICK)

    def contributed() -> list[str]:
        status = json.loads(get(f"http://127.0.0.1:{cluster.http_port}/api/status"))
        return [each["agent_id"] for each in status["agents"] if each["outcome"] == "accepted"]

    edge_1 = agent(cluster, 1, 2, "all")
    until(contributed, server)
    until(lambda: progress(cluster, "edge-1")["contributed_round"] == 1, edge_1)
    forgetting = cluster.forget("edge-1")
    assert forgetting.wait() == 0, forgetting.output
    assert edge_1.wait() == 1
    assert contributed() == []
    (cluster.folder / "edge-1/tls/identity.pem").unlink()
    agents = [agent(cluster, number, 2, "all") for number in (1, 2)]
    assert [each.wait() for each in agents] == [0, 0]
    assert server.wait() == 0
    assert [each["agent_id"] for each in cluster.report()["agents"]] == ["edge-1", "edge-2"]
    assert main(["check", str(cluster.state_dir)]) == 0


def test_fine_tune_begins_anew_without_an_agent_that_is_forgotten(cluster: Cluster) -> None:
    settings = ("--rounds", 1, "--min-agents", 2, "--set", "run.pretrain.epochs=1")
    server = cluster.server(*settings, "--set", "run.fine_tune.epochs=400")
    edge_1, edge_2 = (agent(cluster, number, 2, "all") for number in (1, 2))
    job = JobDirectory(cluster.state_dir / "jobs/round-0001")
    until(lambda: any(line.phase == "fine_tuning" for line in job.read_progress(0)[0]), server)
    forgetting = cluster.forget("edge-2")
    assert forgetting.wait() == 0, forgetting.output
    assert "no published model had used its data" in forgetting.output
    assert check_forgotten(cluster, "edge-2", forgetting.output) == []
    assert edge_2.wait() == 1
    assert edge_1.wait() == server.wait() == 0
    report = cluster.report()
    assert [each["agent_id"] for each in report["agents"]] == ["edge-1"]
    assert [item.agent_id for item in job.read_job().contributions] == ["edge-1"]
    assert report["outcome"] == "published"
    assert main(["check", str(cluster.state_dir)]) == 0


@pytest.mark.soak
def test_fine_tune_that_a_stopped_server_left_begins_anew_too(cluster: Cluster) -> None:
    settings = ("--rounds", 1, "--min-agents", 2, "--set", "run.pretrain.epochs=1")
    settings += ("--set", "run.fine_tune.epochs=400")
    server = cluster.server(*settings)
    edge_1, _ = (agent(cluster, number, 2, "all") for number in (1, 2))
    job = JobDirectory(cluster.state_dir / "jobs/round-0001")
    until(lambda: any(line.phase == "fine_tuning" for line in job.read_progress(0)[0]), server)
    server.kill()
    forgetting = cluster.forget("edge-2")
    assert forgetting.wait() == 0, forgetting.output
    check_forgotten(cluster, "edge-2", forgetting.output)
    server = cluster.server(*settings)
    assert edge_1.wait() == server.wait() == 0
    assert [each["agent_id"] for each in cluster.report()["agents"]] == ["edge-1"]
    assert main(["check", str(cluster.state_dir)]) == 0
