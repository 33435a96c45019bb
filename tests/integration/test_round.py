"""Whole rounds by real processes over real gRPC."""

import json
import signal
import sqlite3
import urllib.request
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

from safetensors import safe_open

from ecavg.common.transfer import blob_of
from tests.processes import Cluster, cluster_in, free_port, until

QUICK = ("--set", "run.pretrain.epochs=2", "--set", "run.fine_tune.epochs=2")


def run(cluster: Cluster, agents: list[tuple[str, str]], *server_args: object) -> str:
    """Do a run with one agent for each (name, partition), started one after the other.

    Returns:
        The digest of the last published model.
    """
    server = cluster.server("--min-agents", len(agents), *QUICK, *server_args)
    started = []
    for name, partition in agents:
        started.append(cluster.agent(name, "--partition", partition))
        started[-1].wait_for("joined as")
    assert [agent.wait() for agent in started] == [0] * len(agents)
    assert server.wait() == 0  # it knows that all have heard of the end, and waits for none to come back
    rounds = sorted((cluster.state_dir / "rounds").iterdir())
    digest: str = json.loads((rounds[-1] / "report.json").read_text("utf-8"))["weights"]["sha256"]
    return digest


def test_three_agents_run_a_round_and_all_apply_the_global_model(cluster: Cluster) -> None:
    run(cluster, [("edge-1", "1/3"), ("edge-2", "2/3"), ("edge-3", "3/3")])
    report = cluster.report()

    assert (report["round"], report["outcome"]) == (1, "published")
    assert (report["model"], report["dataset"]) == ("mlp", "digits")
    assert [agent["agent_id"] for agent in report["agents"]] == ["edge-1", "edge-2", "edge-3"]
    # 1797 digits in three parts, about a fifth of each kept on the device.
    assert all(abs(agent["num_examples"] - 479) < 40 for agent in report["agents"])
    assert all(agent["applied"] for agent in report["agents"])
    assert report["rejected"] == report["late"] == []
    assert set(report["candidates"]) == {"aligned", "average", "best_agent", "greedy_soup"}
    assert report["candidates"][report["start"]] == max(report["candidates"].values())
    assert report["published"] == "fine_tuned"
    assert report["accuracy_published"] == report["accuracy_fine_tuned"] > 0.8
    assert set(report["seconds"]) == {"collect", "audit", "aggregate", "fine_tune", "evaluate", "publish"}

    published = cluster.state_dir / "rounds/0001/model.safetensors"
    assert blob_of(published)._asdict() == {
        "digest": report["weights"]["sha256"],
        "size_bytes": report["weights"]["bytes"],
    }
    for agent in report["agents"]:
        folder = cluster.folder / agent["agent_id"]
        assert (folder / "model.safetensors").read_bytes() == published.read_bytes()
        own = json.loads((folder / "report.json").read_text("utf-8"))
        assert own["accuracy_after"] == agent["accuracy_after"]
        assert own["accuracy_before"] == agent["accuracy_before"] == agent["accuracy_local"]
    with safe_open(published, "numpy") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
            "1.weight": [64, 64],
            "1.bias": [64],
            "3.weight": [10, 64],
            "3.bias": [10],
        }


def test_published_digest_does_not_depend_on_who_came_first(cluster: Cluster, tmp_path: Path) -> None:
    agents = [("edge-1", "1/2"), ("edge-2", "2/2")]
    digest = run(cluster, agents)
    with cluster_in(tmp_path / "again") as other:
        assert run(other, agents[::-1]) == digest


def test_global_model_starts_the_next_round(cluster: Cluster) -> None:
    # With its own start for a candidate, the second round might do no better, and publish the first's model.
    run(cluster, [("edge-1", "1/1")], "--rounds", 2, "--set", 'run.candidates=["average"]')
    first, second = cluster.report(1), cluster.report(2)
    assert first["weights"] != second["weights"]
    assert second["accuracy_published"] >= first["accuracy_published"] - 0.05
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        started_from = dict(database.execute("SELECT number, initial_weights FROM rounds"))
    assert started_from[2] == first["weights"]["sha256"]
    # What a third round would start from is kept, and the shard; the rest has served.
    kept = {path.name for path in (cluster.folder / "edge-1/work").iterdir()}
    assert kept == {f"{second['weights']['sha256']}.safetensors"}
    assert len(list((cluster.folder / "edge-1/shards").iterdir())) == 1


def test_agents_that_start_before_the_server_wait_for_it(cluster: Cluster) -> None:
    port = free_port()
    cluster.port = port
    agent = cluster.agent("edge-1", "--partition", "1/1")
    agent.wait_for("waiting for 127.0.0.1")
    server = cluster.server("--min-agents", 1, *QUICK)
    assert agent.wait() == 0
    assert server.wait() == 0


def test_health_status_and_metrics_are_served(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 1, "--set", "run.pretrain.epochs=100000")
    base = f"http://127.0.0.1:{cluster.http_port}"
    assert get(f"{base}/healthz") == "ok\n"
    assert get(f"{base}/readyz") == "ready\n"
    assert "<html" in get(f"{base}/")
    assert json.loads(get(f"{base}/api/status"))["phase"] == "collecting"

    agent = cluster.agent("edge-1", "--partition", "1/1", "--metrics-port", 0, "--set", "x=1")
    assert agent.wait() == 2  # an agent has no tables to set

    agent = cluster.agent("edge-1", "--partition", "1/1", "--metrics-port", 0)
    own = agent.wait_for(r"metrics on (http://\S+?)/metrics")[1]
    until(lambda: 'ecavg_agent_phase{phase="pre_training"} 1.0' in get(f"{own}/metrics"), agent)
    assert get(f"{own}/healthz") == "ok\n"
    assert agent.terminate() == server.terminate() == 0


def test_sigterm_stops_both_cleanly(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 2, *QUICK)
    agent = cluster.agent("edge-1", "--partition", "1/2")
    agent.wait_for("local accuracy")
    agent.process.send_signal(signal.SIGINT)
    assert agent.wait(15) == 0
    assert server.terminate() == 0
    assert "Traceback" not in server.output + agent.output


def get(url: str) -> str:
    """Return the body; "" while the port is not open yet, or is just being closed."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            body: str = reply.read().decode()
            return body
    except (OSError, HTTPException):
        return ""
