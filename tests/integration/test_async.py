"""Rounds that wait for nobody, by real processes: a slow agent's contribution is merged with less weight."""

import math
import signal
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.jobs import JobDirectory, round_job
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.faults import Point
from ecavg.common.weights import read_state_dict
from tests.processes import Cluster, Command, until
from tests.soak import others_soak

SETTINGS = (
    "--set", 'run.mode="async"',
    "--set", "run.pretrain.epochs=2",
    "--set", "run.fine_tune.epochs=0",
    "--set", 'run.candidates=["average"]',
    "--set", "run.max_norm_ratio=0",
)  # fmt: skip
# The slow agent may stay away for many rounds on a busy machine.
PATIENT = (*SETTINGS, "--rounds", 0, "--min-agents", 2, "--buffer-size", 2, "--keep-rounds", 1000)
AGENT = ("--checkpoint-seconds", 0)


def start_agent(cluster: Cluster, name: str, *, dies_at: str = "") -> Command:
    env = {"ECAVG_CRASH_AT": dies_at} if dies_at else None
    return cluster.agent(name, *AGENT, "--partition", f"{name[-1]}/3", env=env)


def start_slow_agent(cluster: Cluster) -> None:
    """Have edge-3 begin its pre-training in round 1, and die in the middle of it."""
    slow = start_agent(cluster, "edge-3", dies_at=f"{Point.AGENT_EPOCH_SAVED}:1:{cluster.folder / 'died'}")
    assert slow.wait() == -signal.SIGKILL


def is_published(cluster: Cluster, number: int) -> bool:
    return StateDir(cluster.state_dir).report(number).exists()


def contributors(cluster: Cluster, number: int) -> dict[str, int]:
    """Return the staleness of each contribution to a round, by agent id."""
    if not is_published(cluster, number):
        return {}
    return {agent["agent_id"]: agent["staleness"] for agent in cluster.report(number)["agents"]}


# Where the server or the slow agent dies when the slow agent comes back; `make test` does a few of them.
POINTS = (
    Point.AGENT_PRETRAINED,
    Point.AGENT_UPLOADED,
    Point.AGENT_CONTRIBUTED,
    Point.AGENT_CONTRIBUTION_SAVED,
    Point.SERVER_CONTRIBUTION_RECORDED,
    Point.SERVER_PHASE_RECORDED,
    Point.SERVER_JOB_WRITTEN,
    Point.TRAINER_TENSOR_AVERAGED,
    Point.TRAINER_RESULT_WRITTEN,
    Point.SERVER_MODEL_ADOPTED,
    Point.SERVER_ROUND_OPENED,
)


@pytest.mark.parametrize("point", others_soak((None, *POINTS), (Point.SERVER_CONTRIBUTION_RECORDED,)))
def test_fast_agents_go_on_and_what_the_slow_one_has_done_counts_less(
    cluster: Cluster, point: Point | None
) -> None:
    server = cluster.server(*PATIENT)
    start_slow_agent(cluster)
    fast = [start_agent(cluster, name) for name in ("edge-1", "edge-2")]
    until(lambda: is_published(cluster, 2), server)
    assert all(contributors(cluster, number) == {"edge-1": 0, "edge-2": 0} for number in (1, 2))
    # From now on a round needs the slow agent, too.
    fast[1].kill()
    number = until(lambda: round_that_waits(cluster), server)
    server.kill()
    armed = {"ECAVG_CRASH_AT": f"{point}:1:{cluster.folder / 'died-again'}"} if point else {}
    is_agent = bool(point and point.startswith("agent"))
    server = cluster.server(*PATIENT, env={} if is_agent else armed)
    slow = cluster.agent("edge-3", *AGENT, "--partition", "3/3", env=armed if is_agent else {})
    if point:
        victim = slow if is_agent else server
        until(lambda: (cluster.folder / "died-again").exists(), slow if is_agent else fast[0])
        if not point.startswith("trainer"):
            assert victim.wait() == -signal.SIGKILL
            if is_agent:
                start_agent(cluster, "edge-3")
            else:
                server = cluster.server(*PATIENT)
    until(lambda: is_published(cluster, number), fast[0])
    # One model was published in each round before.
    assert contributors(cluster, number) == {"edge-1": 0, "edge-3": number - 1}
    server.kill()
    check_average(cluster, number)
    check_job_again(cluster, number)
    assert main(["check", str(cluster.state_dir)]) == 0


def round_that_waits(cluster: Cluster) -> int | None:
    """Return the number of the round to which edge-1 alone has contributed, once there is one."""
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        (number,) = database.execute("SELECT max(number) FROM rounds").fetchone()
        rows = database.execute("SELECT agent_id FROM contributions WHERE round = ?", (number,)).fetchall()
    return number if rows == [("edge-1",)] else None


def check_job_again(cluster: Cluster, number: int) -> None:
    """Check that the recorded assignment of contributions to the round gives the same bytes again."""
    state_dir = StateDir(cluster.state_dir)
    again = JobDirectory(cluster.folder / "again/jobs/round")
    again.write_job(round_job(state_dir, number).read_job())
    work.run_job(again, blobs_dir=state_dir.blobs, device_name="cpu", group=Group())
    result = again.read_result()
    assert result
    assert result.weights
    assert result.weights.sha256 == cluster.report(number)["weights"]["sha256"]


def round_of(cluster: Cluster, agent_id: str) -> int | None:
    """Return the first published round that has a contribution of the agent."""
    numbers = sorted(int(path.name) for path in StateDir(cluster.state_dir).rounds.iterdir())
    return next((number for number in numbers if agent_id in contributors(cluster, number)), None)


def check_average(cluster: Cluster, number: int) -> None:
    """Check the published model against the mean of the updates, computed here in float64."""
    with closing(Store(cluster.state_dir)) as store:
        row, decisions = store.round(number), store.contributions(number)
    assert row
    assert row.published_digest

    def weights(digest: str) -> dict[str, np.ndarray]:
        path = blob_path(StateDir(cluster.state_dir).blobs, digest)
        return {name: tensor.double().numpy() for name, tensor in read_state_dict(path).items()}

    initial, published = weights(row.initial_digest), weights(row.published_digest)
    total, sums = 0.0, {name: np.zeros_like(values) for name, values in initial.items()}
    for decision in decisions:
        item = decision.contribution
        if item is None:
            continue
        assert item.initial_digest
        factor = item.num_examples / math.sqrt(1 + item.staleness)
        own, start = weights(item.weights_digest), weights(item.initial_digest)
        total += factor
        for name in sums:
            sums[name] += factor * (own[name] - start[name])
    for name, values in published.items():
        np.testing.assert_allclose(values, initial[name] + sums[name] / total, atol=1e-6)


@pytest.mark.soak
def test_agent_that_is_too_old_starts_again(cluster: Cluster) -> None:
    server = cluster.server(*PATIENT, "--max-staleness", 1)
    start_slow_agent(cluster)
    for name in ("edge-1", "edge-2"):
        start_agent(cluster, name)
    until(lambda: is_published(cluster, 3), server)
    slow = start_agent(cluster, "edge-3")
    slow.wait_for("contribution rejected: pre-training started from")
    number = until(lambda: round_of(cluster, "edge-3"), server)
    assert contributors(cluster, number)["edge-3"] <= 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", 'run.mode="async"', "--agents-per-round", 2), 'agents_per_round is for run.mode = "sync"'),
        (("--buffer-size", 2), 'buffer_size is for run.mode = "async": set that as well'),
    ],
)
def test_combinations_that_cannot_be_are_one_line(
    cluster: Cluster, args: tuple[object, ...], message: str
) -> None:
    server = cluster.server(*args, ready=False)
    assert server.wait() == 2
    assert message in server.output
    assert len(server.output.splitlines()) == 1
