"""One learning-rate schedule over the rounds of a run, through the real commands."""

import re
from pathlib import Path

import pytest

from ecavg.cloud_server.jobs import Job, round_job
from ecavg.cloud_server.state_dir import StateDir
from tests.integration.test_data_travel_once import Device, next_rounds
from tests.processes import Cluster, cluster_in

OVER_RUN = (
    "--min-agents", 2,
    "--set", "run.pretrain.schedule_over=run", "--set", "run.fine_tune.schedule_over=run",
    "--set", "run.pretrain.epochs=2", "--set", "run.fine_tune.epochs=1", "--set", "run.seed=3",
)  # fmt: skip
# In the logs of server and agents.
FULL_CURVE = r'"round": (\d+), (?:"reason": "[^"]*", )?"event": "full_curve"'


def play(cluster: Cluster, rounds: int, *, killed: bool = False) -> list[str]:
    """Play the run until it has so many rounds, and return the digests of all its models."""
    server = cluster.server(*OVER_RUN, "--rounds", rounds)
    agents = [cluster.agent(f"edge-{n}", "--partition", f"{n}/2") for n in (1, 2)]
    if killed:
        agents[0].wait_for("round 1: accuracy before")
        agents[0].kill()
        agents[0] = cluster.agent("edge-1", "--partition", "1/2")
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    return [cluster.report(number)["weights"]["sha256"] for number in range(1, rounds + 1)]


def job(cluster: Cluster, number: int) -> Job:
    return round_job(StateDir(cluster.state_dir), number).read_job()


def planned_rounds(cluster: Cluster, number: int) -> int:
    return job(cluster, number).planned_rounds


@pytest.mark.soak
def test_agent_that_is_started_again_has_the_same_place_in_the_schedule(
    cluster: Cluster, tmp_path: Path
) -> None:
    undisturbed = play(cluster, 3)
    with cluster_in(tmp_path / "other") as other:
        assert play(other, 3, killed=True) == undisturbed


def test_plan_stays_when_more_rounds_are_asked_for(cluster: Cluster) -> None:
    first = play(cluster, 2)
    assert play(cluster, 3)[:2] == first
    assert [planned_rounds(cluster, number) for number in (1, 2, 3)] == [2, 2, 2]


@pytest.mark.soak
def test_run_without_an_end_plans_one_round(cluster: Cluster) -> None:
    server = cluster.server(*OVER_RUN, "--rounds", 0)
    agents = [cluster.agent(f"edge-{n}", "--partition", f"{n}/2") for n in (1, 2)]
    agents[0].wait_for("round 2: accuracy before")
    assert [each.terminate() for each in (*agents, server)] == [0, 0, 0]
    assert planned_rounds(cluster, 2) == 1


@pytest.mark.soak
def test_full_curve_comes_back_once_when_the_shared_images_have_grown_by_half(cluster: Cluster) -> None:
    one_agent = ("--min-agents", 1, *OVER_RUN[2:], "--rounds", 0, "--keep-rounds", 1000)
    device = Device(cluster)
    server = cluster.server(*one_agent)
    device.add(range(200))
    device.start()
    next_rounds(cluster, device.command, 3)

    for command in (device.command, server):
        command.kill()
    device.add(range(200, 400))
    server = cluster.server(*one_agent)
    device.start()
    full_curve = int(server.wait_for(FULL_CURVE)[1])
    lives = [device.command]
    device.command.kill()
    server.kill()
    server = cluster.server(*one_agent)
    device.start()
    lives.append(device.command)
    next_rounds(cluster, device.command, 4)
    assert device.command.terminate() == server.terminate() == 0

    last = len(list((cluster.state_dir / "rounds").glob("*/report.json")))
    jobs = [job(cluster, number) for number in range(1, last + 1)]
    assert [each.round for each in jobs if each.has_full_curve] == [full_curve]
    followed = {number for life in lives for number in re.findall(FULL_CURVE, life.output)}
    assert followed == {str(full_curve)}
    shared = [cluster.report(each.round)["num_shared"] for each in jobs]
    assert shared[full_curve - 3] == shared[0] < shared[full_curve - 2] / 1.5
