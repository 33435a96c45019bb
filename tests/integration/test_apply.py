"""Agents that disagree about a published model: each goes by its own figures."""

import json
import re
import sqlite3
import urllib.request
from contextlib import closing
from typing import Any

from ecavg.common.transfer import blob_of
from tests.processes import Cluster, Command

GENERALIST, SPECIALIST = "edge-1", "edge-2"
SETTINGS = (
    "--min-agents", 2, "--rounds", 2,
    "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=10",
)  # fmt: skip


def agents_of(cluster: Cluster) -> tuple[Command, Command]:
    generalist = cluster.agent(GENERALIST, "--partition", "1/1")
    specialist = cluster.agent(SPECIALIST, "--data", "tests.integration.sources:misread_digits")
    return generalist, specialist


def test_specialist_keeps_its_own_model_where_the_global_one_does_worse(cluster: Cluster) -> None:
    server = cluster.server(*SETTINGS, "--set", "run.adapt_epochs=0")
    generalist, specialist = agents_of(cluster)
    generalist.wait_for("round 1: accuracy before .*, applied")
    specialist.wait_for(r"round 1: kept its own model: accuracy .* on \d+ held-out examples, worse by more")
    assert min(reports_counted(cluster).values()) >= 1  # round 2 may have its reports already
    assert [generalist.wait(), specialist.wait(), server.wait()] == [0, 0, 0]

    first, second = (cluster.report(number) for number in (1, 2))
    agents = {agent["agent_id"]: agent for agent in first["agents"]}
    assert (agents[GENERALIST]["applied"], agents[SPECIALIST]["applied"]) == (True, False)
    assert agents[GENERALIST]["accuracy_after"] > agents[GENERALIST]["accuracy_before"]
    assert agents[SPECIALIST]["accuracy_after"] < 0.5 < agents[SPECIALIST]["accuracy_before"]
    assert agents[SPECIALIST]["reason"] in texts_of(specialist.output)

    # Both start the next round from what the server published, also the one that does not use it.
    starts = initial_weights(cluster)
    assert starts == [first["agents"][0]["initial_weights"], first["weights"]["sha256"]]
    for report, start in zip((first, second), starts, strict=True):
        assert [agent["initial_weights"] for agent in report["agents"]] == [start, start]

    # What is in use was trained here, bit by bit.
    own = json.loads((cluster.folder / SPECIALIST / "report.json").read_text("utf-8"))
    assert (own["round"], own["applied"], own["initial_weights"]) == (2, False, starts[1])
    assert own["reason"] == second["agents"][1]["reason"]
    in_use = blob_of(cluster.folder / SPECIALIST / "model.safetensors").digest
    assert in_use in contributed(cluster, SPECIALIST)


def test_specialist_adapts_the_global_model_where_that_does_worse(cluster: Cluster) -> None:
    server = cluster.server(*SETTINGS, "--rounds", 1, "--set", "run.adapt_epochs=20")
    generalist, specialist = agents_of(cluster)
    generalist.wait_for(r"round 1: accuracy before 0\.\d{4}, after 0\.\d{4}, applied")
    specialist.wait_for(r"round 1: accuracy before \d\.\d{4}, after 0\.\d{4}, adapted \d\.\d{4}, applied")
    assert [generalist.wait(), specialist.wait(), server.wait()] == [0, 0, 0]

    report = cluster.report()
    agents = {agent["agent_id"]: agent for agent in report["agents"]}
    assert all(agent["applied"] and "reason" not in agent for agent in agents.values())
    assert "accuracy_adapted" not in agents[GENERALIST]
    found = agents[SPECIALIST]
    assert found["accuracy_after"] < 0.5 < found["accuracy_before"] <= found["accuracy_adapted"]
    own = json.loads((cluster.folder / SPECIALIST / "report.json").read_text("utf-8"))
    assert own["accuracy_adapted"] == found["accuracy_adapted"]
    assert query(cluster, "SELECT score_adapted FROM reports ORDER BY agent_id") == [
        None,
        found["accuracy_adapted"],
    ]

    # What the specialist uses is neither what was published nor its own.
    published = report["weights"]["sha256"]
    in_use = [blob_of(cluster.folder / name / "model.safetensors").digest for name in agents]
    assert in_use[0] == published
    assert in_use[1] not in (published, *contributed(cluster, SPECIALIST))


def reports_counted(cluster: Cluster) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}/metrics") as reply:
        text = reply.read().decode()
    counts = re.findall(r'^ecavg_server_reports_total{applied="(\w+)"} (\S+)$', text, re.MULTILINE)
    assert {applied for applied, _ in counts} == {"true", "false"}
    return {applied: float(count) for applied, count in counts}


def texts_of(output: str) -> str:
    """Return the texts of an agent's log, which has one JSON object in each line."""
    return "\n".join(json.loads(line).get("text", "") for line in output.splitlines())


def query(cluster: Cluster, sql: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        return [row[0] for row in database.execute(sql, values)]


def initial_weights(cluster: Cluster) -> list[str]:
    return query(cluster, "SELECT initial_weights FROM rounds ORDER BY number")


def contributed(cluster: Cluster, agent_id: str) -> list[str]:
    """Return the weights' digests of the agent's contributions."""
    return query(cluster, "SELECT weights FROM contributions WHERE agent_id = ?", agent_id)
