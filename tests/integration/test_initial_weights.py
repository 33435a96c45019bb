"""Initial weights that somebody else has made, through a real server."""

from pathlib import Path

import pytest

from ecavg.common.config import RunConfig
from ecavg.common.models import build_model
from ecavg.common.transfer import blob_of
from ecavg.common.weights import write_state_dict
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics
from tests.processes import Cluster


@pytest.mark.asyncio
async def test_agents_begin_with_the_weights_of_the_file(cluster: Cluster, tmp_path: Path) -> None:
    path, config = tmp_path / "mine.safetensors", tmp_path / "server.toml"
    state_dict = build_model(RunConfig(hidden_units=20), seed=3).state_dict()
    write_state_dict(state_dict, path, metadata={"made by": "somebody else"})
    config.write_text(f'[run]\nhidden_units = 20\ninitial_weights = "{path}"\n', "utf-8")
    cluster.server("--config", config)

    agent = CloudClient(f"127.0.0.1:{cluster.port}", cluster.enroll("edge-1"), AgentMetrics())
    try:
        await agent.join()
        watch = agent.watch()
        state = await anext(watch)
        await watch.aclose()
        await agent.download(state.initial_weights, tmp_path / "downloaded", lambda *_: None)
    finally:
        await agent.close()
    write_state_dict(state_dict, tmp_path / "expected")
    assert state.initial_weights == blob_of(tmp_path / "downloaded") == blob_of(tmp_path / "expected")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--set", "run.initial_weights=nowhere.safetensors"],
            "cannot read nowhere.safetensors: No such file",
        ),
        (
            ["--preset", "cifar10-mobilenetv2", "--set", "run.initial_weights=pretrained"],
            "cannot fetch https://download.pytorch.org/models/mobilenet_v2-",
        ),
    ],
    ids=["no file", "no network"],
)
def test_initial_weights_that_cannot_be_had_are_named(
    cluster: Cluster, tmp_path: Path, args: list[str], message: str
) -> None:
    no_network = {"TORCH_HOME": str(tmp_path / "torch"), "https_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    server = cluster.server(*args, env=no_network, ready=False)
    assert server.wait() == 2
    last_line = server.output.strip().splitlines()[-1]
    assert last_line.startswith("cloud-server: run.initial_weights: ")
    assert message in last_line
    assert "Traceback" not in server.output
