"""A server whose disk is full or read-only: a small file system of its own, filled and emptied."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_round import QUICK, get
from tests.processes import ROOT, Cluster, until

MIB = 1024 * 1024


@pytest.fixture
def disk(cluster: Cluster) -> Iterator[Path]:
    """Mount a file system of 16 MiB, on which the server keeps its state."""
    cluster.state_dir.mkdir(parents=True)
    mounted = mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", cluster.state_dir)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system takes root: {mounted.stderr.strip()}")
    try:
        yield cluster.state_dir
    finally:
        cluster.close()
        subprocess.run(["umount", "--lazy", cluster.state_dir], check=True)


def mount(*args: object) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess([], 1, "", str(error))


def fill(disk: Path) -> Path:
    """Leave no byte free; the file to remove again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        size = MIB
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return filler


def is_sound(state_dir: Path) -> bool:
    command = [sys.executable, "-m", "ecavg.cloud_server", "check", str(state_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done.returncode == 0


def test_agents_wait_out_a_full_disk_and_the_server_goes_on_serving(cluster: Cluster, disk: Path) -> None:
    cluster.enroll("edge-1")
    server = cluster.server("--min-agents", 1, *QUICK)
    filler = fill(disk)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    agent.wait_for(r"waiting for .*the server's disk takes no data now \(.*\): its operator must see to it")
    assert get(f"http://127.0.0.1:{cluster.http_port}/readyz") == "ready\n"
    assert server.process.poll() is None
    filler.unlink()
    assert agent.wait() == 0
    assert server.wait() == 0
    assert cluster.report()["outcome"] == "published"
    assert is_sound(disk)


def test_agents_wait_out_a_folder_that_became_read_only(cluster: Cluster, disk: Path) -> None:
    cluster.enroll("edge-1")
    server = cluster.server("--min-agents", 1, *QUICK)
    partial = disk / "partial"
    assert mount("--bind", partial, partial).returncode == 0
    assert mount("-o", "remount,bind,ro", partial).returncode == 0
    try:
        agent = cluster.agent("edge-1", "--partition", "1/1")
        agent.wait_for(r"waiting for .*the server's disk takes no data now \(Read-only file system\)")
        assert get(f"http://127.0.0.1:{cluster.http_port}/readyz") == "ready\n"
    finally:
        subprocess.run(["umount", partial], check=True)
    assert agent.wait() == 0
    assert server.wait() == 0
    assert is_sound(disk)


def test_trainer_waits_out_a_full_disk(cluster: Cluster, disk: Path) -> None:
    """Its job is done again, as often as it takes, and none of that is a failed attempt."""
    cluster.enroll("edge-1")
    server = cluster.server("--min-agents", 1, "--max-attempts", 1, "--set", "run.hidden_units=8192", *QUICK)
    # What the agent sends (2.4 MB of weights, 0.1 MB of data) fits, and the model that comes of it does not.
    filler = fill(disk)
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - 4 * MIB)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    server.wait_for("disk takes no data.*job_failed|disk_refuses")
    until(lambda: get(f"http://127.0.0.1:{cluster.http_port}/healthz") == "ok\n", server)
    filler.unlink()
    assert agent.wait() == 0
    assert server.wait() == 0
    assert cluster.report()["outcome"] == "published"
    assert is_sound(disk)
