"""A common start that the cloud trains: round 0 before the edges part, through the real commands."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.jobs import round_job
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.faults import Point
from tests.faults.runs import armed_with
from tests.integration.test_forgetting import provenance
from tests.processes import Cluster, cluster_in, until
from tests.soak import others_soak

QUICK = (
    "--min-agents", 2, "--rounds", 1, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
)  # fmt: skip
WARM = (*QUICK, "--set", "run.warm_up_epochs=1")


def agents_of(cluster: Cluster, *args: object) -> list[Any]:
    return [cluster.agent(f"edge-{number}", "--partition", f"{number}/2", *args) for number in (1, 2)]


def play(cluster: Cluster, *settings: object, share_data: object = "all") -> str:
    """Play a run of one round after the warm-up, and return the digest of its model."""
    server = cluster.server(*settings)
    agents = agents_of(cluster, "--share-data", share_data)
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    return str(cluster.report()["weights"]["sha256"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_in(tmp_path_factory.mktemp("undisturbed")) as cluster:
        play(cluster, *WARM)
        yield cluster


@pytest.fixture(scope="module")
def digest(undisturbed: Cluster) -> str:
    return str(undisturbed.report()["weights"]["sha256"])


def test_edges_part_from_what_the_cloud_has_trained(undisturbed: Cluster) -> None:
    warm_up, first = undisturbed.report(0), undisturbed.report(1)
    assert (warm_up["round"], warm_up["outcome"], warm_up["published"]) == (0, "published", "fine_tuned")
    assert warm_up["accuracy_published"] > warm_up["candidates"]["previous"]
    warmed_up = warm_up["weights"]["sha256"]
    assert [each["initial_weights"] for each in first["agents"]] == [warmed_up, warmed_up]
    job = round_job(StateDir(undisturbed.state_dir), 1).read_job()
    assert job.initial_weights == warmed_up != warm_up["agents"][0]["initial_weights"]
    assert first["candidates"]["previous"] == warm_up["accuracy_published"]


def test_nobody_trains_for_the_warm_up_nor_uses_or_reports_its_model(undisturbed: Cluster) -> None:
    warm_up = undisturbed.report(0)
    assert [each["agent_id"] for each in warm_up["agents"]] == ["edge-1", "edge-2"]
    assert all(each["num_shared"] for each in warm_up["agents"])
    assert not any({"accuracy_local", "applied"} & each.keys() for each in warm_up["agents"])
    assert all(each["applied"] and "accuracy_before" in each for each in undisturbed.report()["agents"])


def test_warmed_up_state_passes_the_check(undisturbed: Cluster, digest: str) -> None:
    assert main(["check", str(undisturbed.state_dir)]) == 0
    models = [(each["round"], each["model"]) for each in provenance(undisturbed.state_dir)]
    assert models == [(0, undisturbed.report(0)["weights"]["sha256"]), (1, digest)]


def test_run_is_done_twice_to_the_same_digest(cluster: Cluster, digest: str) -> None:
    assert play(cluster, *WARM) == digest


DEATHS = (
    (Point.SERVER_CONTRIBUTION_RECORDED, 1),
    (Point.SERVER_MODEL_ADOPTED, 2),
    (Point.SERVER_PHASE_RECORDED, 2),
    (Point.SERVER_PHASE_RECORDED, 4),
)


@pytest.mark.parametrize(("point", "count"), others_soak(DEATHS, DEATHS[:1]))
def test_server_killed_in_the_warm_up_goes_on_to_the_same_digest(
    cluster: Cluster, digest: str, tmp_path: Path, point: Point, count: int
) -> None:
    _, environment = armed_with(point, count, tmp_path / "died")
    server = cluster.server(*WARM, env=dict(environment))
    agents = agents_of(cluster)
    until(lambda: server.process.poll() == -signal.SIGKILL, agents[0])
    assert not (StateDir(cluster.state_dir).report(1)).exists()
    server = cluster.server(*WARM)
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    assert cluster.report()["weights"]["sha256"] == digest
    assert main(["check", str(cluster.state_dir)]) == 0


@pytest.mark.soak
def test_trainer_killed_in_the_warm_up_does_it_again(cluster: Cluster, digest: str, tmp_path: Path) -> None:
    _, environment = armed_with(Point.TRAINER_STEP_DONE, 2, tmp_path / "died")
    server = cluster.server(*WARM, env=dict(environment))
    agents = agents_of(cluster)
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    assert (tmp_path / "died").exists()
    assert round_job(StateDir(cluster.state_dir), 0).read_job().attempt == 2
    assert cluster.report()["weights"]["sha256"] == digest


AGENT_DEATHS = (Point.AGENT_CONTRIBUTED, Point.AGENT_CONTRIBUTION_SAVED)


@pytest.mark.parametrize("point", others_soak(AGENT_DEATHS, AGENT_DEATHS[:1]))
def test_agent_killed_in_the_warm_up_goes_on_to_the_same_digest(
    cluster: Cluster, digest: str, tmp_path: Path, point: Point
) -> None:
    _, environment = armed_with(point, 1, tmp_path / "died")
    server = cluster.server(*WARM)
    victim = cluster.agent("edge-1", "--partition", "1/2", env=dict(environment))
    assert victim.wait() == -signal.SIGKILL
    agents = agents_of(cluster)
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    assert cluster.report()["weights"]["sha256"] == digest
    assert cluster.report(0)["rejected"] == cluster.report(0)["late"] == []


@pytest.mark.soak
def test_where_nobody_shares_there_is_no_warm_up(cluster: Cluster, tmp_path: Path) -> None:
    cold = play(cluster, *WARM, share_data="none")
    assert cluster.report(0)["failure"] == "no agent shares data: the run begins without a warm-up"
    assert main(["check", str(cluster.state_dir)]) == 0
    with cluster_in(tmp_path / "other") as other:
        assert play(other, *QUICK, share_data="none") == cold
        assert not StateDir(other.state_dir).report(0).exists()


@pytest.mark.soak
def test_agent_that_comes_after_the_warm_up_starts_from_its_model(cluster: Cluster, tmp_path: Path) -> None:
    _, environment = armed_with(Point.SERVER_ROUND_OPENED, 1, tmp_path / "died")
    server = cluster.server(*WARM, "--min-agents", 1, env=dict(environment))
    early = cluster.agent("edge-1", "--partition", "1/2")
    until(lambda: server.process.poll() == -signal.SIGKILL, early)
    server = cluster.server(*WARM)
    late = cluster.agent("edge-2", "--partition", "2/2")
    assert [each.wait() for each in (early, late, server)] == [0, 0, 0]
    assert [each["agent_id"] for each in cluster.report(0)["agents"]] == ["edge-1"]
    warmed_up = cluster.report(0)["weights"]["sha256"]
    assert [each["initial_weights"] for each in cluster.report()["agents"]] == [warmed_up, warmed_up]


@pytest.mark.parametrize("settings", [("run.wire=int8",), ("run.retain_data=round", "keep_rounds=1")])
@pytest.mark.soak
def test_warm_up_goes_with_other_settings(cluster: Cluster, settings: tuple[str, ...]) -> None:
    more = [word for setting in settings for word in ("--set", setting)]
    play(cluster, *WARM[:3], 2, *WARM[4:], *more)
    warmed_up = cluster.report(0)["weights"]["sha256"]
    assert {each["initial_weights"] for each in cluster.report(1)["agents"]} == {warmed_up}
    assert cluster.report(2)["outcome"] == "published"
    assert main(["check", str(cluster.state_dir)]) == 0


def test_agent_can_be_forgotten_after_a_warm_up(cluster: Cluster) -> None:
    play(cluster, *WARM)
    forgetting = cluster.forget("edge-2")
    assert forgetting.wait() == 0
    warmed_up, first = (cluster.report(number)["weights"]["sha256"] for number in (0, 1))
    assert f"round 0: {warmed_up}" in forgetting.output
    assert f"round 1: {first}" in forgetting.output
    assert main(["check", str(cluster.state_dir)]) == 0
