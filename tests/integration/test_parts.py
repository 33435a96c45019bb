"""Parts of a model that travel, by real processes: heads and norms of the devices' own, and adapters."""

import shutil
from pathlib import Path

import pytest
import torch

from ecavg.cloud_server.__main__ import main
from ecavg.common.config import RunConfig
from ecavg.common.faults import Point
from ecavg.common.models import build_model
from ecavg.common.schema import read_header
from ecavg.common.weights import StateDict, read_state_dict, write_state_dict
from tests.integration.test_wire import blob_path, has_reports, num_bytes, onlooker, query, wired
from tests.processes import Cluster, until
from tests.soak import others_soak

MODULE = "tests.integration.models"
SETTINGS = (
    "--rounds", 2, "--min-agents", 2, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
    "--set", 'run.apply="always"',
)  # fmt: skip


def run(cluster: Cluster, *settings: object, model: str = "") -> None:
    """Run two agents with different classes to the end."""
    named = ("--set", f"run.model={MODULE}:{model}") if model else ()
    allowed = ("--allow-factory", f"{MODULE}:{model}") if model else ()
    server = cluster.server(*SETTINGS, *named, "--set", 'run.partition_by="classes:5"', *settings)
    agents = [cluster.agent(f"edge-{n}", "--partition", f"{n}/2", *allowed) for n in (1, 2)]
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0], server.output


def models_in_use(cluster: Cluster) -> list[StateDict]:
    return [read_state_dict(cluster.folder / f"edge-{n}/model.safetensors") for n in (1, 2)]


def names_sent(cluster: Cluster) -> set[str]:
    sent = query(cluster, "SELECT weights FROM contributions WHERE outcome = 'accepted'")
    assert len(sent) == 4
    return {name for (digest,) in sent for name in read_header(blob_path(cluster, digest)).schema}


def check_parts(cluster: Cluster, shared: set[str], own: set[str]) -> None:
    """Check that the shared part is the cloud's on both devices, and their own parts differ."""
    published = read_state_dict(cluster.state_dir / "rounds/0002/model.safetensors")
    rest = read_state_dict(cluster.state_dir / "rounds/0002/rest.safetensors")
    first, second = models_in_use(cluster)
    assert published.keys() == shared
    assert first.keys() == second.keys() == shared | rest.keys()
    for name in shared:
        assert torch.equal(first[name], published[name])
        assert torch.equal(second[name], published[name])
    for name in own:
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], rest[name])


def test_each_device_keeps_a_head_of_its_own(cluster: Cluster) -> None:
    run(cluster, "--set", 'run.share_parameters=["1.*"]', *wired("int8"))
    assert names_sent(cluster) == {"1.weight", "1.bias", "1.weight.scale", "1.bias.scale"}
    check_parts(cluster, {"1.weight", "1.bias"}, {"3.weight", "3.bias"})
    report = cluster.report(2)
    rest = query(cluster, f"SELECT digest FROM rests WHERE weights = '{report['weights']['sha256']}'")
    assert rest == [(report["rest"]["sha256"],)]
    assert main(["check", str(cluster.state_dir)]) == 0


def test_each_device_keeps_norms_of_its_own(cluster: Cluster) -> None:
    run(cluster, "--set", 'run.share_parameters=["!2.*"]', model="normed")
    shared = {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert names_sent(cluster) == shared
    check_parts(cluster, shared, {"2.weight", "2.bias", "2.running_mean", "2.running_var"})


async def adapt(cluster: Cluster, *settings: object) -> tuple[float, float]:
    """Run a model of which only the adapter travels; return the bytes that the server took and sent."""
    named = ("--set", f"run.model={MODULE}:low_rank", "--set", 'run.share_parameters="trainable"')
    # No candidate but the average, because a model that is published twice is fetched once.
    server = cluster.server(*SETTINGS, *named, *settings, "--set", 'run.candidates=["average"]')
    async with onlooker(cluster):
        allowed = ("--allow-factory", f"{MODULE}:low_rank")
        for number in (1, 2):
            cluster.agent(f"edge-{number}", "--partition", f"{number}/2", *allowed)
        until(lambda: has_reports(cluster), server)
        received = num_bytes(cluster, "ecavg_server_received_bytes_total", "weights")
        sent = num_bytes(cluster, "ecavg_server_sent_bytes_total", "model")
    return received, sent


async def test_only_the_adapter_of_a_frozen_model_travels(cluster: Cluster) -> None:
    received, sent = await adapt(cluster)
    assert names_sent(cluster) == {"down.weight", "up.weight"}
    adapter = (cluster.state_dir / "rounds/0001/model.safetensors").stat().st_size
    whole = (cluster.folder / "edge-1/model.safetensors").stat().st_size
    assert adapter < whole / 50
    # Two agents in two rounds send as many adapters, and fetch those of the start and of both rounds.
    assert (received, sent) == (4 * adapter, 6 * adapter)
    assert len(query(cluster, "SELECT DISTINCT digest FROM rests")) == 1


async def test_device_fetches_once_the_frozen_part_that_it_cannot_make(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The run starts from a file, so that the frozen part is another one than the model is built with."""
    run = RunConfig(model=f"{MODULE}:low_rank")
    write_state_dict(build_model(run, seed=3).state_dict(), tmp_path / "start.safetensors")
    received, sent = await adapt(cluster, "--set", f"run.initial_weights={tmp_path}/start.safetensors")
    adapter = (cluster.state_dir / "rounds/0001/model.safetensors").stat().st_size
    rest = (cluster.state_dir / "rounds/0001/rest.safetensors").stat().st_size
    assert (received, sent) == (4 * adapter, 6 * adapter + 2 * rest)


def test_pattern_that_matches_nothing_ends_the_server_at_its_start(cluster: Cluster) -> None:
    server = cluster.server("--set", 'run.share_parameters=["features.*"]', ready=False)
    assert server.wait() == 2
    last_line = server.output.strip().splitlines()[-1]
    assert "'features.*' matches no tensor of model 'mlp', which has 1.weight, 1.bias" in last_line
    assert "Traceback" not in server.output


@pytest.mark.parametrize("newcomer", others_soak(["edge-2", "edge-3"], ["edge-3"]))
def test_device_goes_on_with_its_own_head_and_a_late_one_begins_with_the_clouds(
    cluster: Cluster, tmp_path: Path, newcomer: str
) -> None:
    """One that has lost its work folder, and one that comes for the second round."""
    server = cluster.server(*SETTINGS, "--set", 'run.share_parameters=["1.*"]')
    dying = {"ECAVG_CRASH_AT": f"{Point.AGENT_REPORTED}:1:{tmp_path / 'died'}"}
    cluster.agent("edge-1", "--partition", "1/2")
    second = cluster.agent("edge-2", "--partition", "2/2", env=dying)
    assert second.wait() == -9
    (path,) = (cluster.folder / "edge-2").glob("rest-*")
    head = read_state_dict(path)
    shutil.rmtree(cluster.folder / "edge-2/work")
    cluster.agent(newcomer, "--partition", "2/2")
    until(lambda: has_reports(cluster), server)
    published = read_state_dict(cluster.state_dir / "rounds/0002/model.safetensors")
    (own,) = (cluster.folder / newcomer).glob("rest-*")
    expected = published | read_state_dict(own)
    in_use = read_state_dict(cluster.folder / newcomer / "model.safetensors")
    assert in_use.keys() == expected.keys()
    assert all(torch.equal(in_use[name], tensor) for name, tensor in expected.items())
    # One epoch of pre-training does not take a head far from where it has begun.
    clouds = read_state_dict(cluster.state_dir / "rounds/0001/rest.safetensors")
    started = {"edge-2": head, "edge-3": clouds}
    distance = {name: float((in_use["3.weight"] - each["3.weight"]).norm()) for name, each in started.items()}
    assert min(distance, key=distance.__getitem__) == newcomer
