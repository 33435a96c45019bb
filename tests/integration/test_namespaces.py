"""Training machines with network stacks of their own and no shared folder, which are killed in turn."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.work import run_job
from ecavg.cloud_server.training.handout import STEP_SECONDS, HandOut
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.models import build_model
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.buckets import Service, s3_service
from tests.integration.test_machines import Machine, wait_for_group
from tests.integration.test_trainer import digits, part, put_blob, put_shard
from tests.namespaces import Network, network_of
from tests.processes import Command, free_port, until

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with network_of(2) as network:
        yield network


@pytest.fixture(scope="module")
def service(network: Network) -> Iterator[Service]:
    with s3_service(network.host) as service:
        yield service


class Asked:
    """A server's job that is handed out through a bucket, without the server."""

    def __init__(self, folder: Path, url: str, num_epochs: int) -> None:
        self.url = url
        self.state_dir = StateDir(folder / "server")
        self.state_dir.blobs.mkdir(parents=True)
        self.run = RunConfig(
            hidden_units=32,
            fine_tune=FineTuneConfig(epochs=num_epochs, batch_size=256, learning_rate=0.005),
        )
        contributions = tuple(self._contribution(agent) for agent in range(2))
        self.job = Job(
            kind="round", name="round-0001", round=1, run=self.run, device="cpu", initial_weights=None,
            contributions=contributions,
        )  # fmt: skip
        bucket = Bucket(url)
        for path in self.state_dir.blobs.glob("??/*"):
            bucket.put(path, path.name)
        self.directory = JobDirectory(self.state_dir.job(self.job.name))
        self.directory.write_job(self.job)
        self._hand_out = HandOut(self.state_dir, bucket)
        self._due = 0.0

    def step(self) -> Result | None:
        """Exchange with the bucket, as often as a server does, and return the result if there is one."""
        if time.monotonic() >= self._due:
            self._hand_out.step()
            self._due = time.monotonic() + STEP_SECONDS
        return self.directory.read_result()

    def checkpoint_at(self, machine: Machine) -> bool:
        self.step()
        return JobDirectory(machine.state_dir.job(self.job.name)).checkpoint_path.exists()

    def is_equal_to_one_ranks(self) -> bool:
        """Do the job here, with one rank, and compare."""
        alone = JobDirectory(self.state_dir.job("alone"))
        alone.write_job(self.job)
        run_job(alone, blobs_dir=self.state_dir.blobs, device_name="cpu", group=Group())
        found, expected = (read_state_dict(each.weights_path) for each in (self.directory, alone))
        # Rounding grows over some thousand steps.
        return all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)

    def _contribution(self, agent: int) -> Contribution:
        blobs, new = self.state_dir.blobs, self.state_dir.blobs / "new"
        half = part(digits(), slice(agent * 900, (agent + 1) * 900))
        write_state_dict(build_model(self.run, seed=agent).state_dict(), new)
        weights = put_blob(new, blobs)
        return Contribution(f"agent-{agent}", weights, (put_shard(half, blobs),), len(half.targets))


class Machines:
    """Two training machines, each of which can be killed and started again with an empty folder."""

    def __init__(self, folder: Path, network: Network, url: str, endpoint: str) -> None:
        self._folder, self._network, self._url, self._endpoint = folder, network, url, endpoint
        self._num_starts = 0
        self.started: list[Machine] = []
        self.now = [self.start(0), self.start(1)]

    def start(self, index: int) -> Machine:
        self._num_starts += 1
        namespace = self._network.machines[index]
        machine = Machine(
            self._folder / f"machine-{self._num_starts}", self._url, self._endpoint, "1:2",
            is_host=self._endpoint.startswith(f"{namespace.address}:"), namespace=namespace,
        )  # fmt: skip
        self.started.append(machine)
        return machine

    def replace(self, index: int) -> None:
        self.now[index] = self.start(index)


@contextmanager
def two_machines(folder: Path, network: Network, url: str, endpoint: str = "") -> Iterator[Machines]:
    """Start two machines; without an endpoint, the rendezvous is on neither of them."""
    port = free_port()
    rendezvous = Command(
        "ecavg.cloud_server.trainer.rendezvous", "--port", port, folder=folder / "rendezvous"
    )
    machines = None
    try:
        machines = Machines(folder, network, url, endpoint or f"{network.host}:{port}")
        yield machines
    finally:
        for machine in machines.started if machines else ():
            machine.kill()
        rendezvous.close()


def until_both_train(asked: Asked, first: Machine, second: Machine) -> None:
    """Wait until both machines are in one group, and have a checkpoint of the round."""
    wait_for_group(first, second)
    until(lambda: asked.checkpoint_at(first) and asked.checkpoint_at(second), first.torchrun)


@pytest.mark.soak
def test_round_is_finished_by_the_machine_that_is_left(
    service: Service, network: Network, tmp_path: Path
) -> None:
    asked = Asked(tmp_path, service.new_bucket(), num_epochs=150)
    with two_machines(tmp_path, network, asked.url) as machines:
        first, second = machines.now
        until_both_train(asked, first, second)
        first.kill()
        result = until(asked.step, second.torchrun, 120)
        assert "training_resumed" in second.output
    assert result.error is None
    assert asked.is_equal_to_one_ranks()


@pytest.mark.soak
def test_machines_that_are_killed_in_turn_and_replaced_finish_the_round(
    service: Service, network: Network, tmp_path: Path
) -> None:
    asked = Asked(tmp_path, service.new_bucket(), num_epochs=600)
    with two_machines(tmp_path, network, asked.url) as machines:
        for killed in (0, 1, 0):
            first, second = machines.now
            until_both_train(asked, first, second)
            machines.now[killed].kill()
            machines.replace(killed)
        result = until(asked.step, machines.now[1].torchrun, 250)
    assert result.error is None
    assert asked.is_equal_to_one_ranks()


@pytest.mark.soak
def test_round_goes_on_when_the_machine_with_the_rendezvous_is_replaced(
    service: Service, network: Network, tmp_path: Path
) -> None:
    asked = Asked(tmp_path, service.new_bucket(), num_epochs=1000)
    endpoint = f"{network.machines[0].address}:{free_port()}"
    with two_machines(tmp_path, network, asked.url, endpoint) as machines:
        first, second = machines.now
        until_both_train(asked, first, second)
        first.kill()
        # Without a rendezvous the other machine's torchrun ends, and a service manager starts it again.
        assert second.torchrun.wait(200) != 0
        machines.replace(0)
        second.start_torchrun()
        result = until(asked.step, second.torchrun, 200)
        assert "training_resumed" in machines.now[0].output + second.output
    assert result.error is None
    assert asked.is_equal_to_one_ranks()


@pytest.mark.soak
def test_machine_whose_cable_is_out_is_given_up(service: Service, network: Network, tmp_path: Path) -> None:
    asked = Asked(tmp_path, service.new_bucket(), num_epochs=300)
    for machine in network.machines:
        machine.set_patience(4)
    with two_machines(tmp_path, network, asked.url) as machines:
        first, second = machines.now
        until_both_train(asked, first, second)
        network.machines[0].set_link("down")
        # Nothing tells the other machine, and nothing more comes.
        result = until(asked.step, second.torchrun, 250)
        assert "training_resumed" in second.output
    network.machines[0].set_link("up")
    assert result.error is None
    assert asked.is_equal_to_one_ranks()
