"""Every named point of the protocol is killed once; the run comes to the same digests, bit by bit."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.common.faults import Point
from ecavg.common.transfer import Blob, blob_of
from tests.faults.runs import (
    ADAPTING,
    AGENTS,
    ASYNC,
    HEADS,
    INT8,
    NUM_ROUNDS,
    SETTINGS,
    WITHDRAWN,
    Run,
    armed_with,
)
from tests.integration.test_forgetting import check_forgotten, provenance
from tests.processes import Cluster, cluster_in, until
from tests.soak import others_soak

pytestmark = pytest.mark.timeout(300)

Case = tuple[Any, ...]

FINISH_SECONDS = 240.0

# The count is the occurrence that leaves most to lose: in mid-transfer, or in a later phase or round.
COUNTS = {
    Point.SERVER_CHUNK_SENT: 2,
    Point.SERVER_CHUNK_STORED: 2,
    Point.AGENT_CHUNK_SENT: 2,
    Point.AGENT_CHUNK_RECEIVED: 2,
    Point.SERVER_PHASE_RECORDED: 2,
    Point.SERVER_CONTRIBUTION_RECORDED: 2,
    Point.TRAINER_TENSOR_AVERAGED: 2,
}
WHILE_ADAPTING = (Point.AGENT_ADAPTED, Point.AGENT_EVALUATED, Point.AGENT_MODEL_APPLIED)
WITH_INT8 = [
    (Point.AGENT_DECODED, 2),  # a model; the first are the initial weights
    (Point.AGENT_ENCODED, 1),
    (Point.AGENT_ENCODED, 2),
    (Point.AGENT_UPLOADED, 2),  # shard, weights
    (Point.AGENT_CONTRIBUTED, 1),
    (Point.SERVER_CONTRIBUTION_RECORDED, 2),
    (Point.TRAINER_WEIGHTS_WRITTEN, 2),
    (Point.SERVER_MODEL_ADOPTED, 2),
    (Point.SERVER_ENCODED_MODEL_ADOPTED, 1),
    (Point.SERVER_ENCODED_MODEL_ADOPTED, 2),
]
WITH_HEADS = [
    (Point.AGENT_WEIGHTS_WRITTEN, 2),
    (Point.AGENT_PRETRAINED, 2),
    (Point.AGENT_DOWNLOADED, 1),
    (Point.AGENT_EVALUATED, 1),
    (Point.AGENT_MODEL_APPLIED, 1),
    (Point.TRAINER_WEIGHTS_WRITTEN, 2),
    (Point.SERVER_MODEL_ADOPTED, 1),
    (Point.SERVER_MODEL_ADOPTED, 2),
]
IN_A_CANARY = [
    (Point.SERVER_PHASE_RECORDED, 4),  # published
    (Point.AGENT_EVALUATED, 1),
    (Point.AGENT_MODEL_APPLIED, 1),
    (Point.SERVER_AGENT_REPORT_RECORDED, 1),
    (Point.SERVER_AGENT_REPORT_RECORDED, 3),  # that an agent has gone back
    (Point.SERVER_CANARY_DECIDED, 1),
    (Point.AGENT_REPORTED, 1),
    (Point.AGENT_WENT_BACK, 1),
]
FORGETTING = (
    Point.SERVER_FORGETTING_ASKED,
    Point.SERVER_AGENT_RECORDS_REMOVED,
    Point.SERVER_AGENT_BLOBS_REMOVED,
    Point.SERVER_AGENT_STRUCK_OUT,
)
ELSEWHERE = (
    *FORGETTING,
    Point.SERVER_CA_KEY_WRITTEN,  # tests/integration/test_identity.py
    Point.SERVER_BLOB_IN_BUCKET,  # tests/faults/test_bucket.py
    Point.SERVER_SAMPLE_DRAWN,  # tests/integration/test_sampling.py
    Point.SERVER_CANARY_DECIDED,
    Point.AGENT_WENT_BACK,
    Point.AGENT_ADAPTED,
    Point.AGENT_DECODED,
    Point.AGENT_ENCODED,
    Point.SERVER_ENCODED_MODEL_ADOPTED,
)
CASES = [(point, COUNTS.get(point, 1)) for point in Point if point not in ELSEWHERE] + [
    (Point.SERVER_PHASE_RECORDED, 1),  # aggregating
    (Point.SERVER_PHASE_RECORDED, 3),  # evaluating
    (Point.SERVER_PHASE_RECORDED, 4),  # published
    (Point.SERVER_REPORT_WRITTEN, NUM_ROUNDS + 1),  # agents' reports are in one of so many, at least
]

# `make test` does one case of each kind: what dies, in a transfer or at a durable step.
OF_EACH_KIND = (
    (Point.SERVER_CHUNK_STORED, 2),
    (Point.SERVER_PHASE_RECORDED, 3),
    (Point.TRAINER_TENSOR_AVERAGED, 2),
    (Point.AGENT_CHUNK_SENT, 2),
)
OF_EACH_KIND_WITH_HEADS = ((Point.AGENT_WEIGHTS_WRITTEN, 2),)
OF_EACH_KIND_WITH_INT8 = ((Point.AGENT_ENCODED, 2),)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return digests_of_undisturbed_run(tmp_path_factory, SETTINGS)


@pytest.fixture(scope="module")
def undisturbed_int8(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return digests_of_undisturbed_run(tmp_path_factory, INT8)


@pytest.fixture(scope="module")
def undisturbed_heads(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return digests_of_undisturbed_run(tmp_path_factory, HEADS)


def digests_of_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, settings: tuple[object, ...]
) -> list[str]:
    with cluster_in(tmp_path_factory.mktemp("undisturbed")) as cluster:
        run = Run(cluster, settings)
        run.start()
        digests = run.finish(FINISH_SECONDS)
        assert run.num_restarts == 0
        return digests


@pytest.mark.parametrize(("point", "count"), others_soak(CASES, OF_EACH_KIND))
def test_killed_at_any_point_the_run_publishes_the_same(
    undisturbed: list[str], cluster: Cluster, tmp_path: Path, point: Point, count: int
) -> None:
    assert digests_of_killed_run(cluster, SETTINGS, point, count, tmp_path / "died") == undisturbed


@pytest.mark.parametrize(("point", "count"), others_soak(WITH_INT8, OF_EACH_KIND_WITH_INT8))
def test_killed_at_any_point_differences_come_to_the_same(
    undisturbed_int8: list[str], cluster: Cluster, tmp_path: Path, point: Point, count: int
) -> None:
    assert digests_of_killed_run(cluster, INT8, point, count, tmp_path / "died") == undisturbed_int8


@pytest.mark.parametrize(("point", "count"), others_soak(CASES, [(Point.AGENT_CONTRIBUTED, 1)]))
def test_killed_at_any_point_async_rounds_in_which_nobody_is_late_publish_what_sync_ones_do(
    undisturbed: list[str], cluster: Cluster, tmp_path: Path, point: Point, count: int
) -> None:
    assert digests_of_killed_run(cluster, ASYNC, point, count, tmp_path / "died") == undisturbed


@pytest.mark.parametrize(("point", "count"), others_soak(WITH_HEADS, OF_EACH_KIND_WITH_HEADS))
def test_killed_at_any_point_agents_keep_their_heads(
    undisturbed_heads: list[str], cluster: Cluster, tmp_path: Path, point: Point, count: int
) -> None:
    assert digests_of_killed_run(cluster, HEADS, point, count, tmp_path / "died") == undisturbed_heads


def digests_of_killed_run(
    cluster: Cluster, settings: tuple[object, ...], point: Point, count: int, marker: Path
) -> list[str]:
    victim, environment = armed_with(point, count, marker)
    run = Run(cluster, settings)
    run.start(victim, environment)
    digests = run.finish(FINISH_SECONDS)
    assert marker.exists(), "the point was never reached"
    for number in range(1, NUM_ROUNDS + 1):
        report = cluster.report(number)
        assert [agent["agent_id"] for agent in report["agents"]] == list(AGENTS)
        assert report["late"] == report["rejected"] == report["vanished"] == []
        assert all(agent["applied"] for agent in report["agents"])
    assert [entry["model"] for entry in provenance(cluster.state_dir)] == digests
    return digests


Agents = list[dict[str, Any]]  # as the round's report has them


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Agents, str, Blob]:
    """Do a run in which one agent adapts the global model.

    Returns:
        The report's agents, the id of the agent that adapts, and the model that this agent then uses.
    """
    with cluster_in(tmp_path_factory.mktemp("adapting")) as cluster:
        run = Run(cluster, ADAPTING)
        run.start()
        run.finish(FINISH_SECONDS)
        agents = cluster.report()["agents"]
        (who,) = (agent["agent_id"] for agent in agents if "accuracy_adapted" in agent)
        return agents, who, blob_of(cluster.folder / who / "model.safetensors")


@pytest.mark.parametrize("point", others_soak(zip(WHILE_ADAPTING, strict=True), [(Point.AGENT_ADAPTED,)]))
def test_killed_while_it_adapts_an_agent_uses_the_same_model(
    adapting: tuple[Agents, str, Blob], cluster: Cluster, tmp_path: Path, point: Point
) -> None:
    agents, who, in_use = adapting
    _, environment = armed_with(point, 1, tmp_path / "died")
    run = Run(cluster, ADAPTING)
    run.start(who, environment)
    run.finish(FINISH_SECONDS)
    assert (tmp_path / "died").exists(), "the point was never reached"
    assert cluster.report()["agents"] == agents
    assert all(agent["applied"] for agent in agents)
    assert blob_of(cluster.folder / who / "model.safetensors") == in_use
    assert not (cluster.folder / who / "work/adapted.safetensors").exists()


@pytest.fixture(scope="module")
def withdrawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Do a run whose model is withdrawn; return its report, and the id of the agent that has used it."""
    with cluster_in(tmp_path_factory.mktemp("withdrawn")) as cluster:
        run = Run(cluster, WITHDRAWN)
        run.start()
        run.finish(FINISH_SECONDS)
        (who,) = (name for name in AGENTS if "that of round 1 is in use again" in run.processes[name].output)
        return without_times(cluster.report()), who


@pytest.mark.parametrize(
    ("point", "count"),
    others_soak(IN_A_CANARY, [(Point.SERVER_CANARY_DECIDED, 1)]),
)
def test_killed_in_a_canary_the_model_is_withdrawn_and_its_agent_goes_back(
    withdrawn: tuple[dict[str, Any], str], cluster: Cluster, tmp_path: Path, point: Point, count: int
) -> None:
    report, who = withdrawn
    victim, environment = armed_with(point, count, tmp_path / "died")
    run = Run(cluster, WITHDRAWN)
    run.start("server" if victim == "server" else who, environment)
    run.finish(FINISH_SECONDS)
    assert (tmp_path / "died").exists(), "the point was never reached"
    assert without_times(cluster.report()) == report
    assert report["canary"] == list(AGENTS)
    assert report["roll_out"]["state"] == "withdrawn"
    assert [agent["applied"] for agent in report["agents"]] == [False, False]
    (entry,) = provenance(cluster.state_dir)
    assert entry["withdrawn"]
    published = report["weights"]["sha256"]
    assert all(blob_of(cluster.folder / name / "model.safetensors").digest != published for name in AGENTS)
    assert main(["check", str(cluster.state_dir)]) == 0


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    roll_out = {name: value for name, value in report["roll_out"].items() if name != "at"}
    return {**report, "roll_out": roll_out, "seconds": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do a run of one round, and return its folder."""
    folder = tmp_path_factory.mktemp("finished")
    with cluster_in(folder) as cluster:
        run = Run(cluster, (*SETTINGS, "--rounds", 1))
        run.start()
        run.finish(FINISH_SECONDS)
    return folder


@pytest.fixture
def restored(finished: Path, cluster: Cluster) -> Cluster:
    shutil.copytree(finished, cluster.folder, dirs_exist_ok=True)
    return cluster


@pytest.mark.parametrize(
    "point", others_soak(zip(FORGETTING, strict=True), [(Point.SERVER_AGENT_BLOBS_REMOVED,)])
)
def test_forgetting_that_was_killed_is_done_by_the_same_command_again(
    restored: Cluster, tmp_path: Path, point: Point
) -> None:
    _, environment = armed_with(point, 1, tmp_path / "died")
    assert restored.forget("edge-2", dict(environment)).wait() == -signal.SIGKILL
    again = restored.forget("edge-2")
    assert again.wait() == 0, again.output
    assert check_forgotten(restored, "edge-2", again.output) == [1]
    assert [entry.get("round") for entry in provenance(restored.state_dir)] == [None, 1]
    assert main(["check", str(restored.state_dir)]) == 0


@pytest.mark.parametrize(
    "point", others_soak(zip(FORGETTING[1:], strict=True), [(Point.SERVER_AGENT_RECORDS_REMOVED,)])
)
def test_forgetting_that_a_server_was_killed_at_is_done_by_the_next(
    restored: Cluster, tmp_path: Path, point: Point
) -> None:
    _, asked = armed_with(Point.SERVER_FORGETTING_ASKED, 1, tmp_path / "asked")
    assert restored.forget("edge-2", dict(asked)).wait() == -signal.SIGKILL
    _, environment = armed_with(point, 1, tmp_path / "died")
    settings = (*SETTINGS, "--rounds", 0)
    assert restored.server(*settings, env=dict(environment), ready=False).wait() == -signal.SIGKILL
    server = restored.server(*settings)
    said = server.wait_for(r"forgotten-\w+")[0]
    (model,) = provenance(restored.state_dir)[0]["models"]
    assert check_forgotten(restored, "edge-2", f"{said} round 1: {model['model']}") == [1]
    server.kill()
    assert main(["check", str(restored.state_dir)]) == 0


def test_command_whose_server_is_killed_forgets_by_itself(restored: Cluster, tmp_path: Path) -> None:
    _, environment = armed_with(Point.SERVER_AGENT_RECORDS_REMOVED, 1, tmp_path / "died")
    server = restored.server(*SETTINGS, "--rounds", 0, env=dict(environment))
    forgetting = restored.forget("edge-2")
    assert forgetting.wait() == 0, forgetting.output
    until(lambda: server.process.poll() == -signal.SIGKILL, forgetting)
    assert check_forgotten(restored, "edge-2", forgetting.output) == [1]
    assert main(["check", str(restored.state_dir)]) == 0
