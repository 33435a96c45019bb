"""Who takes part in a round: samples of the agents, and agents that are not ready, by real processes."""

import sqlite3
from contextlib import closing
from pathlib import Path

from common.faults import Point
from tests.processes import Cluster, Command, cluster_in

AGENTS = ("edge-1", "edge-2", "edge-3")
QUICK = (
    "--set", "run.pretrain.epochs=2",
    "--set", "run.fine_tune.epochs=1",
    "--set", 'run.candidates=["average"]',
    "--rounds", 2,
)  # fmt: skip
# A draw waits for all three, so that it does not depend on who comes first.
SAMPLED = (*QUICK, "--min-agents", 1, "--min-connected", 3)


def start_agents(cluster: Cluster) -> list[Command]:
    return [
        cluster.agent(name, "--partition", f"{number}/3", "--share-data", "all")
        for number, name in enumerate(AGENTS, 1)
    ]


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


def test_same_seed_draws_the_same_sample(cluster: Cluster, tmp_path: Path) -> None:
    run(cluster, "--agents-per-round", 1)
    with cluster_in(tmp_path / "again") as other:
        run(other, "--agents-per-round", 1)
        assert drawn(other) == drawn(cluster)
        assert other.report(2)["weights"] == cluster.report(2)["weights"]


def test_draw_outlives_the_server(cluster: Cluster, tmp_path: Path) -> None:
    died = tmp_path / "died"
    args = (*SAMPLED, "--agents-per-round", 1)
    server = cluster.server(*args, env={"ECAVG_CRASH_AT": f"{Point.SERVER_SAMPLE_DRAWN}:1:{died}"})
    agents = start_agents(cluster)
    assert server.wait() != 0
    assert died.exists()
    with closing(sqlite3.connect(cluster.state_dir / "ecavg.sqlite3")) as database:
        on_record = [name for (name,) in database.execute("SELECT agent_id FROM selections WHERE round = 1")]
    assert len(on_record) == 1

    # The next life would draw one of the two others, which alone are there.
    place = AGENTS.index(on_record[0])
    agents[place].kill()
    server = cluster.server(*args, "--min-connected", 2)
    for agent in agents[:place] + agents[place + 1 :]:
        agent.wait_for("not drawn for round 1: waiting for the model")
    agents[place] = cluster.agent(on_record[0], "--partition", f"{place + 1}/3")
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    assert contributors(cluster, 1) == cluster.report(1)["drawn"] == on_record


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
