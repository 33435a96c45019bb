"""Training on other machines: jobs go through a bucket, and the machines share no folder."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.jobs import JobDirectory
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.trainer.group import OWN_STORE
from ecavg.common.weights import read_state_dict
from tests.buckets import Service, s3_service
from tests.namespaces import INTERFACE, Namespace
from tests.processes import Cluster, Command, cluster_in, free_port, until
from tests.unit.test_ranks import are_close

# They start PyTorch six times; tests/unit/test_handout.py has the steps one by one.
pytestmark = [pytest.mark.timeout(400), pytest.mark.soak]

SETTINGS = (
    "--min-agents", 2, "--insecure", "--set", "run.pretrain.epochs=1", "--set", "run.hidden_units=32",
)  # fmt: skip
DATA = ("--insecure", "--data", "tests.faults.runs:blobs")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


class Machine:
    """A training machine with a folder of its own: a relay, and torchrun with one rank."""

    def __init__(
        self,
        folder: Path,
        bucket: str,
        rendezvous: str,
        num_nodes: str,
        *,
        is_host: bool,
        namespace: Namespace | None = None,
    ) -> None:
        self.state_dir = StateDir(folder / "work")
        where = ("--state-dir", self.state_dir)
        prefix, address = (namespace.prefix, namespace.address) if namespace else ((), "127.0.0.1")
        self.relay = Command(
            "ecavg.cloud_server.training.relay", "--bucket", bucket, *where, folder=folder, prefix=prefix
        )
        self._launch = partial(
            Command, "torch.distributed.run",
            "--nnodes", num_nodes, "--nproc-per-node", 1, "--max-restarts", 5,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous, "--rdzv-id", "round",
            "--rdzv-conf", f"is_host={int(is_host)},last_call_timeout=1,keep_alive_interval=2",
            "--local-addr", address,
            "-m", "ecavg.cloud_server.trainer", *where, "--device", "cpu", "--checkpoint-seconds", 0,
            folder=folder, prefix=prefix,
            env={OWN_STORE: "1", "GLOO_SOCKET_IFNAME": INTERFACE if namespace else None},
        )  # fmt: skip
        self.start_torchrun()

    def start_torchrun(self) -> None:
        """Start torchrun, as a service manager does, also when it has ended."""
        self.torchrun = self._launch()

    @property
    def output(self) -> str:
        return self.torchrun.output + self.relay.output

    def kill(self) -> None:
        """Kill every process of the machine at once, those that torchrun has started as well."""
        mine = str(self.state_dir).encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mine in process.joinpath("cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        for command in (self.relay, self.torchrun):
            command.process.wait()


@contextmanager
def machines(folder: Path, url: str, num_nodes: str = "2") -> Iterator[list[Machine]]:
    rendezvous = f"127.0.0.1:{free_port()}"
    # With the machine that has the rendezvous, all of it would end.
    started = [
        Machine(folder / name, url, rendezvous, num_nodes, is_host=name == "first")
        for name in ("first", "second")
    ]
    try:
        yield started
    finally:
        for machine in started:
            machine.kill()


def wait_for_group(*machines: Machine) -> None:
    """Wait until the machines have found each other, which takes long on a busy computer."""
    for machine in machines:
        machine.torchrun.wait_for('"world_size": 2', 200)


def start_agents(cluster: Cluster) -> list[Command]:
    return [cluster.agent(f"edge-{n}", *DATA, "--partition", f"{n}/2") for n in (1, 2)]


def finish(cluster: Cluster, server: Command, agents: list[Command]) -> Path:
    """Wait for the end of the round, and return the file of its model."""
    assert [agent.wait(200) for agent in agents] == [0, 0]
    assert server.wait() == 0
    return StateDir(cluster.state_dir).model(1)


def trained_by_one_rank(folder: Path, *settings: object) -> Path:
    with cluster_in(folder / "alone") as cluster:
        server = cluster.server(*SETTINGS, *settings)
        return finish(cluster, server, start_agents(cluster))


def test_two_machines_without_a_shared_folder_train_what_one_rank_trains(
    service: Service, cluster: Cluster, tmp_path: Path
) -> None:
    url = service.new_bucket()
    with machines(tmp_path, url) as (first, second):
        wait_for_group(first, second)
        server = cluster.server(*SETTINGS, "--blobs", url, "--trainers", "external")
        together = read_state_dict(finish(cluster, server, start_agents(cluster)))
        assert all("job_done" in machine.output for machine in (first, second))
        # What was handed out goes from the bucket and from the machines.
        assert not Bucket(url).names("jobs")
        for machine in (first, second):
            until(lambda here=machine: not list(here.state_dir.jobs.iterdir()), machine.relay)
    assert are_close(together, read_state_dict(trained_by_one_rank(tmp_path)))


def test_machine_that_is_killed_leaves_its_job_to_the_other(
    service: Service, cluster: Cluster, tmp_path: Path
) -> None:
    url, long = service.new_bucket(), ("--set", "run.fine_tune.epochs=400", "--max-attempts", 1)
    with machines(tmp_path, url, "1:2") as (first, second):
        wait_for_group(first, second)
        server = cluster.server(*SETTINGS, *long, "--blobs", url, "--trainers", "external")
        agents = start_agents(cluster)
        kept = [JobDirectory(each.state_dir.job("round-0001")).checkpoint_path for each in (first, second)]
        until(lambda: all(path.exists() for path in kept), first.torchrun)
        second.kill()
        found = read_state_dict(finish(cluster, server, agents))
        assert "training_resumed" in first.output
    assert are_close(found, read_state_dict(trained_by_one_rank(tmp_path, *long)))
