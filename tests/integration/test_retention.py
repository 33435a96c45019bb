"""What a real server leaves of old rounds, and that `cloud-server check` finds nothing wrong with it."""

import json

from ecavg.cloud_server.__main__ import main
from tests.processes import Cluster

QUICK = ("--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")


def test_old_rounds_leave_their_reports_and_the_state_is_sound(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 1, "--rounds", 3, "--keep-rounds", 1, *QUICK)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    assert agent.wait() == 0
    assert server.wait() == 0

    rounds = cluster.state_dir / "rounds"
    assert [path.parent.name for path in sorted(rounds.glob("*/model.safetensors"))] == ["0003"]
    reports = [json.loads(path.read_text("utf-8")) for path in sorted(rounds.glob("*/report.json"))]
    assert [report["outcome"] for report in reports] == ["published"] * 3
    assert all("accuracy_after" in report["agents"][0] for report in reports)
    results = [path.parent.name for path in (cluster.state_dir / "jobs").glob("round-*/result.json")]
    assert results == ["round-0003"]
    # The run's first initial weights; round 3: its start, local weights, shard, model (maybe one of those).
    assert 4 <= len(list((cluster.state_dir / "blobs").glob("*/*"))) <= 5
    assert main(["check", str(cluster.state_dir)]) == 0
