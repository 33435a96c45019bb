"""Two devices with one identity, because a state directory was copied, through the real commands."""

import re
import shutil
from pathlib import Path

import pytest

from tests.processes import Cluster, Command

MESSAGE = (
    "another device uses the identity pi: was its state directory copied?"
    " enroll this one under an id of its own"
)


def clone_of(cluster: Cluster, name: str) -> Path:
    """Copy the state directory of an agent that has enrolled."""
    copied = cluster.folder / f"copy-of-{name}"
    cluster.enroll(name)
    shutil.copytree(cluster.folder / name, copied)
    return copied


def start_clone(cluster: Cluster, folder: Path, *args: object) -> Command:
    return cluster.agent("pi", "--state-dir", folder, *args)


def test_second_of_two_running_devices_with_one_identity_is_refused(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 2)
    copied = clone_of(cluster, "pi")
    first = cluster.agent("pi", "--partition", "1/2")
    first.wait_for("contributed")
    second = start_clone(cluster, copied, "--partition", "2/2")
    assert second.wait() == 2
    assert second.output.strip().splitlines()[-1] == f"edge-agent: {MESSAGE}"
    server.wait_for("identity_in_use_twice")
    assert MESSAGE in server.output
    assert first.process.poll() is None

    other = cluster.agent("pj", "--partition", "2/2")
    assert [each.wait() for each in (first, other, server)] == [0, 0, 0]
    assert [agent["agent_id"] for agent in cluster.report()["agents"]] == ["pi", "pj"]


@pytest.mark.soak
def test_contribution_of_a_copy_that_comes_later_is_not_said_to_be_accepted(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 2)
    copied = clone_of(cluster, "pi")
    first = cluster.agent("pi", "--partition", "1/2")
    server.wait_for('"event": "contribution"')
    assert first.terminate() == 0
    second = start_clone(cluster, copied, "--partition", "2/2")
    stands = f"another contribution of pi to round 1 stands; {MESSAGE}"
    second.wait_for(re.escape(f"round 1: contribution rejected: {stands}"))
    server.wait_for("other_contribution_stands")
    assert MESSAGE in server.output
    other = cluster.agent("pj", "--partition", "2/2")
    assert [each.wait() for each in (second, other, server)] == [0, 0, 0]


@pytest.mark.soak
def test_device_that_lost_its_progress_and_does_the_same_again_is_no_second_device(cluster: Cluster) -> None:
    """It was set back to a copy of before the round, and has the same data."""
    server = cluster.server("--min-agents", 2)
    copied = clone_of(cluster, "pi")
    first = cluster.agent("pi", "--partition", "1/2")
    server.wait_for('"event": "contribution"')
    first.kill()
    again = start_clone(cluster, copied, "--partition", "1/2")
    again.wait_for("contributed")
    other = cluster.agent("pj", "--partition", "2/2")
    assert [each.wait() for each in (again, other, server)] == [0, 0, 0]
    assert "another device" not in again.output + server.output


def test_restarted_device_is_no_second_device(cluster: Cluster) -> None:
    """The Watch of the process that was killed may still be open."""
    server = cluster.server("--min-agents", 2)
    for _ in range(3):
        agent = cluster.agent("pi", "--partition", "1/2")
        agent.wait_for("joined as pi")
        agent.kill()
    agents = [cluster.agent("pi", "--partition", "1/2"), cluster.agent("pj", "--partition", "2/2")]
    assert [each.wait() for each in (*agents, server)] == [0, 0, 0]
    assert "another device" not in agents[0].output + server.output
