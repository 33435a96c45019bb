"""Models of a user's own that are odd, through the real commands: they work, or are refused at the start."""

import json
from pathlib import Path

import pytest

from tests.processes import Cluster
from tests.soak import others_soak

MODULE = "tests.integration.models"


def run_of(name: str, *more: str) -> tuple[str, ...]:
    return ("--min-agents", "2", "--set", f"run.model={MODULE}:{name}", *more)


def accuracy_on(cluster: Cluster, agent_id: str) -> float:
    path = cluster.folder / agent_id / "report.json"
    accuracy: float = json.loads(path.read_text("utf-8"))["accuracy_after"]
    return accuracy


ODD_ONES = (
    ("auxiliary", ()),
    ("spectral", ("--set", "run.wire=int8", "--set", "run.aggregator=median")),
    ("left_out_buffer", ()),
    ("left_out_buffer", ("--set", "run.initial_weights=independent")),
    ("tied", ()),
    ("lazy", ()),
    ("scripted", ()),
    ("weight_norm", ()),
)


@pytest.mark.parametrize(("name", "more"), others_soak(ODD_ONES, ODD_ONES[:3]))
def test_published_model_is_as_good_on_the_devices_as_in_the_cloud(
    cluster: Cluster, name: str, more: tuple[str, ...]
) -> None:
    server = cluster.server(*run_of(name, *more))
    agents = [cluster.agent(agent_id, "--allow-factory", f"{MODULE}:{name}") for agent_id in ("a", "b")]
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    published = cluster.report()["accuracy_published"]
    assert published > 0.75
    for agent_id in ("a", "b"):
        assert abs(accuracy_on(cluster, agent_id) - published) < 0.15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unseeded", "is not determined by its state_dict"),
        ("extra_state", "its state_dict has '_extra_state', which is dict and no tensor"),
        ("frozen", "has no parameter that could be trained"),
        ("only_evaluates", "failed: RuntimeError: this model is for inference"),
    ],
)
def test_model_that_cannot_work_ends_the_server_at_its_start(
    cluster: Cluster, name: str, message: str
) -> None:
    server = cluster.server(*run_of(name), ready=False)
    assert server.wait() == 2
    assert message in server.output.strip().splitlines()[-1]
    assert "Traceback" not in server.output


def test_device_with_another_model_behind_the_same_name_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server(*run_of("by_environment"))
    allowed = ("--allow-factory", f"{MODULE}:by_environment")
    agent = cluster.agent("a", *allowed, env={"SCALE_OF_THIS_MACHINE": "0.5"})
    assert agent.wait() == 2
    assert "gives other outputs here than on the server" in agent.output.strip().splitlines()[-1]
    assert "Traceback" not in agent.output
