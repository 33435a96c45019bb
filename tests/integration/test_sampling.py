"""Who takes part in a round: samples of the agents, and agents that are not ready, by real processes."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ecavg.common.faults import Point
from tests.integration.test_round import get
from tests.processes import Cluster, Command, cluster_in, free_port, until

AGENTS = ("edge-1", "edge-2", "edge-3")
QUICK = (
    "--set", "run.pretrain.epochs=2",
    "--set", "run.fine_tune.epochs=1",
    "--set", 'run.candidates=["average"]',
    # Every agent is to have the same model in the end.
    "--set", 'run.apply="always"',
    "--rounds", 2,
)  # fmt: skip
# A draw waits for all three, so that it does not depend on who comes first.
SAMPLED = (*QUICK, "--min-agents", 1, "--min-connected", 3)


def start_agents(cluster: Cluster, *, not_ready: str = "") -> list[Command]:
    """Start the agents; one of them is not ready until there is a file `ready`."""
    return [start_agent(cluster, name, is_ready=name != not_ready) for name in AGENTS]


def start_agent(cluster: Cluster, name: str, *, is_ready: bool = True) -> Command:
    words = () if is_ready else ("test", "-e", cluster.folder / "ready")
    command = [f"--ready-command={word}" for word in words]
    partition = f"{AGENTS.index(name) + 1}/3"
    return cluster.agent(name, "--partition", partition, "--ready-seconds", 0.1, *command)


def run(cluster: Cluster, *server_args: object) -> list[str]:
    """Do a run of three agents, and return what each has shown."""
    server = cluster.server(*SAMPLED, *server_args)
    agents = start_agents(cluster)
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    return [agent.output for agent in agents]


def contributors(cluster: Cluster, number: int) -> list[str]:
    return [agent["agent_id"] for agent in cluster.report(number)["agents"]]


def drawn(cluster: Cluster) -> list[list[str]]:
    return [cluster.report(number)["drawn"] for number in (1, 2)]


def reported(cluster: Cluster, number: int) -> list[str]:
    """Return the agents that have reported on the model of a round."""
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        rows = database.execute("SELECT agent_id FROM reports WHERE round = ? ORDER BY agent_id", (number,))
        return [agent_id for (agent_id,) in rows]


def test_those_that_are_drawn_contribute_and_all_get_the_model(cluster: Cluster) -> None:
    outputs = run(cluster, "--agents-per-round", 2)
    for number in (1, 2):
        report = cluster.report(number)
        assert len(report["drawn"]) == 2
        assert contributors(cluster, number) == report["drawn"]
        assert report["not_ready"] == report["vanished"] == report["late"] == report["rejected"] == []
        assert reported(cluster, number) == list(AGENTS)
        for name, output in zip(AGENTS, outputs, strict=True):
            is_told = f"not drawn for round {number}: waiting for the model" in output
            assert is_told == (name not in report["drawn"])
            assert (f"round {number}: local accuracy" in output) == (name in report["drawn"])
    published = (cluster.state_dir / "rounds/0002/model.safetensors").read_bytes()
    assert all((cluster.folder / name / "model.safetensors").read_bytes() == published for name in AGENTS)


@pytest.mark.soak
def test_same_seed_draws_the_same_sample(cluster: Cluster, tmp_path: Path) -> None:
    run(cluster, "--agents-per-round", 1)
    with cluster_in(tmp_path / "again") as other:
        run(other, "--agents-per-round", 1)
        assert drawn(other) == drawn(cluster)
        assert other.report(2)["weights"] == cluster.report(2)["weights"]


@pytest.mark.soak
def test_draw_outlives_the_server(cluster: Cluster, tmp_path: Path) -> None:
    name, others = kill_after_draw(cluster, tmp_path / "died")
    # The next life would draw one of the two others, which alone are there.
    server = cluster.server(*SAMPLED[:-1], 2, "--agents-per-round", 1)
    for other in others:
        other.wait_for("not drawn for round 1: waiting for the model")
    agents = [start_agent(cluster, name), *others]
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    assert contributors(cluster, 1) == cluster.report(1)["drawn"] == [name]


def kill_after_draw(cluster: Cluster, died: Path) -> tuple[str, list[Command]]:
    """Kill the server when it has drawn one of three agents, and then this agent.

    Returns:
        The name of the agent, and the two others.
    """
    environment = {"ECAVG_CRASH_AT": f"{Point.SERVER_SAMPLE_DRAWN}:1:{died}"}
    server = cluster.server(*SAMPLED, "--agents-per-round", 1, env=environment)
    agents = dict(zip(AGENTS, start_agents(cluster), strict=True))
    assert server.wait() != 0
    assert died.exists()
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        ((name,),) = database.execute("SELECT agent_id FROM selections WHERE round = 1")
    agents.pop(name).kill()
    return name, list(agents.values())


@pytest.mark.soak
def test_after_the_deadline_another_agent_takes_the_place_of_one_that_is_gone(
    cluster: Cluster, tmp_path: Path
) -> None:
    name, others = kill_after_draw(cluster, tmp_path / "died")
    server = cluster.server(*SAMPLED[:-1], 2, "--agents-per-round", 1, "--deadline-seconds", 1)
    assert [agent.wait() for agent in others] == [0, 0]
    assert server.wait() == 0
    report = cluster.report(1)
    (contributor,) = contributors(cluster, 1)
    assert report["drawn"] == sorted([name, contributor])
    assert report["vanished"] == [name]


@pytest.mark.soak
def test_report_says_who_was_drawn_and_did_not_contribute(cluster: Cluster) -> None:
    run(cluster, "--agents-per-round", 1, "--over-selection", 2)
    for number in (1, 2):
        report = cluster.report(number)
        assert len(report["drawn"]) == 2
        assert len(contributors(cluster, number)) == 1
        assert sorted(contributors(cluster, number) + report["late"] + report["vanished"]) == report["drawn"]


def test_wrong_combinations_of_keys_are_one_line(cluster: Cluster) -> None:
    for args, why in (
        (("--min-agents", 3, "--agents-per-round", 2), "agents_per_round 2 is below min_agents 3"),
        (("--over-selection", 1.5), "over_selection is for a server with agents_per_round"),
        (
            ("--min-agents", 1, "--max-agents", 2, "--agents-per-round", 3),
            "max_agents 2 is below agents_per_round 3",
        ),
        (
            ("--min-agents", 2, "--agents-per-round", 3, "--min-connected", 1),
            "min_connected 1 is below min_agents 2",
        ),
    ):
        server = cluster.server(*args, ready=False)
        assert server.wait() == 2
        assert why in server.output
        assert len(server.output.splitlines()) == 1


def test_agent_that_is_not_ready_is_passed_over_until_it_is(cluster: Cluster) -> None:
    ready = cluster.folder / "ready"
    server = cluster.server(*SAMPLED[:-2], "--min-connected", 2, "--agents-per-round", 2)
    agents = start_agents(cluster, not_ready="edge-1")
    agents[0].wait_for("not ready: test ended with exit code 1; taking part when ready_command says so")
    agents[0].wait_for(r"round 1: accuracy before none, after \S+, applied")
    ready.touch()
    agents[0].wait_for("ready: taking part again")
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    first = cluster.report(1)
    assert contributors(cluster, 1) == first["drawn"] == ["edge-2", "edge-3"]
    assert "edge-1" not in first["vanished"]
    assert reported(cluster, 1) == reported(cluster, 2) == list(AGENTS)
    assert "round 1: local accuracy" not in agents[0].output


def test_agent_that_is_not_ready_does_not_contribute_and_takes_the_model(cluster: Cluster) -> None:
    server = cluster.server(*QUICK, "--min-agents", 1)
    agents = [start_agent(cluster, "edge-1", is_ready=False)]
    agents[0].wait_for("not ready: test ended with exit code 1")
    agents[0].wait_for("shared are")
    agents.append(start_agent(cluster, "edge-2"))
    assert [agent.wait() for agent in agents] == [0, 0]
    assert server.wait() == 0
    for number in (1, 2):
        report = cluster.report(number)
        assert contributors(cluster, number) == ["edge-2"]
        assert report["not_ready"] == ["edge-1"]
        assert report["vanished"] == []
        assert "drawn" not in report
        assert reported(cluster, number) == ["edge-1", "edge-2"]


@pytest.mark.soak
def test_agent_that_is_busy_is_passed_over_from_then_on(cluster: Cluster) -> None:
    busy = cluster.folder / "busy"
    server = cluster.server(*SAMPLED[:-1], 2, "--agents-per-round", 2)
    words = [f"--ready-command={word}" for word in ("test", "!", "-e", busy)]
    agents = [cluster.agent("edge-1", "--partition", "1/3", "--ready-seconds", 0.1, *words)]
    until(lambda: ready_agents(cluster) == {"edge-1": True}, agents[0])
    busy.touch()
    until(lambda: ready_agents(cluster) == {"edge-1": False}, agents[0])
    agents += [start_agent(cluster, name) for name in AGENTS[1:]]
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    for number in (1, 2):
        assert contributors(cluster, number) == cluster.report(number)["drawn"] == ["edge-2", "edge-3"]
        assert cluster.report(number)["not_ready"] == ["edge-1"]
        assert reported(cluster, number) == list(AGENTS)


def ready_agents(cluster: Cluster) -> dict[str, bool]:
    """Return whether each agent that is here is ready, as the status page shows it."""
    agents = json.loads(get(f"http://127.0.0.1:{cluster.http_port}/api/status"))["agents"]
    return {agent["agent_id"]: agent["is_ready"] for agent in agents if agent["state"] != "away"}


@pytest.mark.parametrize("sample", [(), ("--agents-per-round", 1)], ids=["without-sample", "with-sample"])
def test_round_waits_for_an_agent_that_becomes_ready(cluster: Cluster, sample: tuple[object, ...]) -> None:
    server = cluster.server(*QUICK, "--min-agents", 1, *sample)
    agent = start_agent(cluster, "edge-1", is_ready=False)
    agent.wait_for("not ready: test ended with exit code 1")
    agent.wait_for("shared are")
    (cluster.folder / "ready").touch()
    assert agent.wait() == 0
    assert server.wait() == 0
    assert contributors(cluster, 2) == ["edge-1"]
    assert not cluster.report(1).get("not_ready")


def test_command_that_cannot_be_run_is_one_line(cluster: Cluster) -> None:
    cluster.port = free_port()
    not_executable = cluster.folder / "idle.sh"
    not_executable.write_text("exit 0", "utf-8")
    for program in ("no-such-program", not_executable):
        agent = cluster.agent("edge-1", "--ready-command", program)
        assert agent.wait() == 2
        assert f"{program} is no program that can be run" in agent.output
        assert len(agent.output.splitlines()) == 1


@pytest.mark.soak
def test_warm_up_draws_its_own_sample(cluster: Cluster) -> None:
    outputs = run(cluster, "--agents-per-round", 2, "--rounds", 1, "--set", "run.warm_up_epochs=1")
    for number in (0, 1):
        report = cluster.report(number)
        assert report["outcome"] == "published"
        assert contributors(cluster, number) == report["drawn"]
        assert len(report["drawn"]) == 2
    for name, output in zip(AGENTS, outputs, strict=True):
        is_told = "not drawn for the warm-up: waiting for round 1" in output
        assert is_told == (name not in cluster.report(0)["drawn"])
