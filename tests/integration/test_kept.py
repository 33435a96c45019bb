"""The state directories of earlier releases: server and agents of this version go on from them."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.transfer import blob_of
from tests.kept import AGENTS, archives, unpack
from tests.processes import Cluster

FIRST, SECOND = AGENTS
ACCEPTED = "SELECT weights FROM contributions WHERE round = ? AND agent_id = ? AND outcome = 'accepted'"


def query(cluster: Cluster, statement: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(StateDir(cluster.state_dir).database)) as database:
        return database.execute(statement, values).fetchall()


def change_progress(folder: Path, **fields: Any) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


@pytest.fixture(params=archives(), ids=lambda path: path.name.removesuffix(".tar.gz"))
def kept(cluster: Cluster, request: pytest.FixtureRequest) -> Cluster:
    unpack(request.param, cluster.folder)
    return cluster


def test_there_is_an_archive() -> None:
    assert archives()


def test_server_and_agents_go_on_where_an_earlier_release_stopped(kept: Cluster) -> None:
    contributed = query(kept, ACCEPTED, 2, FIRST)
    assert contributed
    first_model = blob_of(StateDir(kept.state_dir).model(1))
    first_accuracies = kept.report(1)["agents"]
    assert not StateDir(kept.state_dir).report(2).exists()

    server = kept.server("--config", kept.folder / "server.toml")
    agents = [kept.agent(name) for name in AGENTS]
    assert [each.wait() for each in (server, *agents)] == [0, 0, 0]

    # What the first agent had contributed counts as it was, and no token was needed.
    assert query(kept, ACCEPTED, 2, FIRST) == contributed
    assert query(kept, ACCEPTED, 2, SECOND)
    report = kept.report(2)
    assert report["outcome"] == "published"
    assert [each["agent_id"] for each in report["agents"]] == list(AGENTS)
    assert all(each["accuracy_after"] is not None for each in report["agents"])
    # What was finished is as it was.
    assert blob_of(StateDir(kept.state_dir).model(1)) == first_model
    assert kept.report(1)["agents"] == first_accuracies


def test_state_of_a_newer_release_is_refused_in_one_line(kept: Cluster) -> None:
    with closing(sqlite3.connect(StateDir(kept.state_dir).database)) as database:
        database.execute("PRAGMA user_version = 99")
    server = kept.server("--config", kept.folder / "server.toml", ready=False)
    assert server.wait() == 2
    (line,) = server.output.strip().splitlines()
    assert "schema version 99" in line
    assert "use a newer cloud-server" in line

    change_progress(kept.folder / FIRST, of_the_future=1)
    kept.port = 1
    agent = kept.agent(FIRST)
    assert agent.wait() == 2
    (line,) = agent.output.strip().splitlines()
    assert "progress.json has of_the_future, which a newer edge-agent has written: use that one" in line
