"""A whole round on a GPU: agents and trainer train there, as CUDA graphs, and twice with the same digest."""

from pathlib import Path

import pytest
import torch

from ecavg.cloud_server.state_dir import StateDir
from tests.processes import Cluster, cluster_in

DEVICE = "cuda"
# Each training has more than fifty full batches.
SETTINGS = (
    "--min-agents", 2, "--rounds", 1, "--device", DEVICE,
    "--set", "run.pretrain.epochs=10", "--set", "run.fine_tune.epochs=10",
    "--set", "run.pretrain.batch_size=32", "--set", "run.fine_tune.batch_size=32",
    "--set", "run.adapt_epochs=0",
)  # fmt: skip


def play(cluster: Cluster) -> str:
    """Play a round, and return the digest of its model."""
    server = cluster.server(*SETTINGS)
    agents = [cluster.agent(name, "--device", DEVICE) for name in ("edge-1", "edge-2")]
    assert [agent.wait() for agent in agents] == [0, 0]
    assert server.wait() == 0
    trainer_log = StateDir(cluster.state_dir).trainer_log.read_text("utf-8")
    for log in (trainer_log, *(agent.output for agent in agents)):
        assert "graph_recorded" in log
        assert "graph_not_used" not in log
    digest: str = cluster.report()["weights"]["sha256"]
    return digest


@pytest.mark.timeout(300)
def test_round_is_trained_as_graphs_and_gives_the_same_digest_again(tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs train together, and then nothing is recorded")
    digests = []
    for name in ("first", "second"):
        with cluster_in(tmp_path / name) as cluster:
            digests.append(play(cluster))
    assert digests[0] == digests[1]
