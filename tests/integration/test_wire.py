"""Rounds whose weights travel encoded, by real processes: what arrives, and how many bytes that takes."""

import json
import re
import shutil
import sqlite3
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.faults import Point
from ecavg.common.run_state import RunState
from ecavg.common.schema import read_header
from ecavg.common.transfer import blob_of
from ecavg.common.wire import Base, decode, encoding_of
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics
from tests.processes import Cluster, Command, until
from tests.soak import others_soak

NUM_ROUNDS = 2
SETTINGS = (
    "--rounds", NUM_ROUNDS, "--min-agents", 2,
    "--set", "run.hidden_units=1024", "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
    "--set", 'run.apply="always"', "--set", 'run.candidates=["average"]',
)  # fmt: skip


def wired(wire: str) -> tuple[str, str]:
    return "--set", f'run.wire="{wire}"'


@asynccontextmanager
async def onlooker(cluster: Cluster) -> AsyncIterator[tuple[CloudClient, RunState]]:
    """Watches and never reports: at the end of the run, the server waits for it."""
    client = CloudClient(f"127.0.0.1:{cluster.port}", cluster.enroll("onlooker"), AgentMetrics())
    try:
        await client.join()
        async with aclosing(client.watch()) as states:  # type: ignore[type-var]
            yield client, await anext(states)
    finally:
        await client.close()


def agents_of(cluster: Cluster) -> list[Command]:
    return [cluster.agent(f"edge-{number}", "--partition", f"{number}/2") for number in (1, 2)]


def has_reports(cluster: Cluster, number: int = NUM_ROUNDS, count: int = 2) -> bool:
    path = cluster.state_dir / f"rounds/{number:04d}/report.json"
    agents = json.loads(path.read_text("utf-8"))["agents"] if path.exists() else []
    return [True] * count == ["applied" in agent for agent in agents]


def num_bytes(cluster: Cluster, metric: str, kind: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}/metrics", timeout=30) as reply:
        found = re.search(rf'^{metric}{{kind="{kind}"}} (.*)$', reply.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def query(cluster: Cluster, sql: str) -> list[Any]:
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        return database.execute(sql).fetchall()


def blob_path(cluster: Cluster, digest: str) -> Path:
    return cluster.state_dir / "blobs" / digest[:2] / digest


# Of float32: what is sent up, what comes down; initial weights have no base and are bfloat16 at least.
@pytest.mark.parametrize(
    ("wire", "at_most", "initial_at_most"),
    [("float32", 1, 1), ("bfloat16", 0.51, 0.51), ("int8", 0.27, 0.51)],
)
async def test_weights_travel_encoded_both_ways(
    cluster: Cluster, tmp_path: Path, wire: str, at_most: float, initial_at_most: float
) -> None:
    server = cluster.server(*SETTINGS, *wired(wire))
    async with onlooker(cluster):
        agents_of(cluster)
        until(lambda: has_reports(cluster), server)
        full = cluster.report(1)["weights"]["bytes"]
        assert num_bytes(cluster, "ecavg_server_received_bytes_total", "weights") <= 2 * 2 * at_most * full
        sent = num_bytes(cluster, "ecavg_server_sent_bytes_total", "model")
        assert sent <= 2 * (initial_at_most + 2 * at_most) * full

    for number in (1, 2):
        published = cluster.state_dir / f"rounds/{number:04d}/model.safetensors"
        assert encoding_of(read_header(published)).wire == "float32"
        assert blob_of(published).digest == cluster.report(number)["weights"]["sha256"]
    for agent_id in ("edge-1", "edge-2"):
        assert blob_of(cluster.folder / agent_id / "model.safetensors") == blob_of(published)
    for weights, digest, base in query(cluster, "SELECT weights, digest, base FROM encodings"):
        decode(
            blob_path(cluster, digest),
            tmp_path / "decoded",
            base=base and Base(blob_path(cluster, base), base),
        )
        assert blob_of(tmp_path / "decoded").digest == weights
    expected = {"float32": [], "bfloat16": [None] * 3, "int8": [None, 1, 2]}[
        wire
    ]  # rounds whose start is base
    starts = dict(query(cluster, "SELECT initial_weights, number FROM rounds"))
    assert [starts.get(base) for (base,) in query(cluster, "SELECT base FROM encodings")] == expected


@pytest.mark.parametrize("newcomer", others_soak(["edge-2", "edge-3"], ["edge-3"]))
def test_agent_without_the_base_takes_the_model_as_it_is(
    cluster: Cluster, tmp_path: Path, newcomer: str
) -> None:
    """One that has lost its work folder, and one that comes for the second round."""
    server = cluster.server(*SETTINGS, *wired("int8"))
    dying = {"ECAVG_CRASH_AT": f"{Point.AGENT_REPORTED}:1:{tmp_path / 'died'}"}
    cluster.agent("edge-1", "--partition", "1/2")
    second = cluster.agent("edge-2", "--partition", "2/2", env=dying)
    assert second.wait() == -9
    shutil.rmtree(cluster.folder / "edge-2/work")
    cluster.agent(newcomer, "--partition", "2/2")
    until(lambda: has_reports(cluster), server)  # and not to the end: who has died is expected back
    report = cluster.report(2)
    assert [agent["agent_id"] for agent in report["agents"]] == ["edge-1", newcomer]
    for agent_id in ("edge-1", newcomer):
        assert blob_of(cluster.folder / agent_id / "model.safetensors").digest == report["weights"]["sha256"]
    weights = query(cluster, "SELECT weights FROM contributions WHERE round = 2 AND outcome = 'accepted'")
    headers = [read_header(blob_path(cluster, digest)) for (digest,) in weights]
    assert [encoding_of(header).base for header in headers] == [cluster.report(1)["weights"]["sha256"]] * 2


def test_weights_of_the_agents_own_have_no_base_in_the_first_round(cluster: Cluster) -> None:
    settings = (*SETTINGS, *wired("int8"), "--set", 'run.initial_weights="independent"')
    server = cluster.server(*settings)
    assert [agent.wait() for agent in agents_of(cluster)] == [0, 0]
    assert server.wait() == 0
    sent = query(cluster, "SELECT round, weights FROM contributions ORDER BY round, agent_id")
    encodings = [(number, encoding_of(read_header(blob_path(cluster, digest)))) for number, digest in sent]
    assert [(number, encoding.wire) for number, encoding in encodings] == [
        (1, "bfloat16"), (1, "bfloat16"), (2, "int8"), (2, "int8"),
    ]  # fmt: skip
    assert encodings[2][1].base == cluster.report(1)["weights"]["sha256"]
