"""What the server has of an agent's data is not sent again: bytes counted between real processes."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ecavg.cloud_server.__main__ import main
from ecavg.common.shards import read_shard
from tests.integration.test_round import get
from tests.processes import Cluster, Command, until

SERVER = (
    "--min-agents", 1, "--rounds", 0, "--keep-rounds", 2,
    "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
)  # fmt: skip


class Device:
    """An agent with a folder of digits, started as often as need be."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._images, self._labels = load_digits(return_X_y=True)
        self.folder = cluster.folder / "digits"
        self.shards = cluster.folder / "edge-1/shards"
        self.command: Command
        self._url = ""

    def add(self, numbers: range) -> None:
        for number in numbers:
            path = self.folder / f"train/{self._labels[number]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self._pixels(number)).save(path)

    def remove_one_of(self, shard: Path) -> None:
        """Remove an image that is in the shard, rather than held out."""
        image = read_shard(shard).inputs[0, 0]
        (number,) = (n for n in range(len(self._images)) if np.array_equal(self._pixels(n), image))
        next(self.folder.glob(f"train/*/{number}.png")).unlink()

    def start(self) -> None:
        self.command = self._cluster.agent("edge-1", "--data", self.folder, "--metrics-port", 0)
        self._url = self.command.wait_for(r"metrics on (http://\S+?/metrics)")[1]

    def _pixels(self, number: int) -> np.ndarray:
        return (self._images[number] * 15.9).astype(np.uint8).reshape(8, 8)

    def sent_bytes(self) -> int:
        """Of data, in this life of the agent."""
        return sent(self._url)


def sent(url: str, kind: str = "data") -> int:
    match = re.search(rf'_bytes_total\{{kind="{kind}"\}} (\S+)', get(url))
    assert match
    return int(float(match[1]))


def files(folder: Path) -> dict[str, int]:
    """Names and sizes."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture
def device(cluster: Cluster) -> Device:
    return Device(cluster)


def next_rounds(cluster: Cluster, command: Command, count: int = 2) -> None:
    """Wait until so many more rounds are over: the last of them has begun in the meantime."""
    rounds = cluster.state_dir / "rounds"

    def last() -> int:
        return max((int(path.parent.name) for path in rounds.glob("*/report.json")), default=0)

    goal = last() + count
    until(lambda: last() >= goal, command)


def test_what_the_server_has_is_never_sent_again(cluster: Cluster, device: Device) -> None:
    server = cluster.server(*SERVER)
    device.add(range(200))
    device.start()
    next_rounds(cluster, device.command, 4)  # more than keep_rounds
    (first,) = files(device.shards)
    first_bytes = files(device.shards)[first]
    assert device.sent_bytes() == first_bytes > 64 * 150

    for command in (device.command, server):
        command.kill()
    device.add(range(200, 230))
    server = cluster.server(*SERVER)
    device.start()
    next_rounds(cluster, device.command)
    grown = files(device.shards)
    assert grown.pop(first) == first_bytes
    ((second, second_bytes),) = grown.items()
    received_bytes = sent(f"http://127.0.0.1:{cluster.http_port}/metrics")
    assert device.sent_bytes() == received_bytes == second_bytes < first_bytes / 4

    device.remove_one_of(device.shards / second)  # while the agent runs
    device.command.wait_for("the data have changed")
    next_rounds(cluster, device.command)
    left = files(device.shards)
    assert left.pop(first) == first_bytes
    ((third, third_bytes),) = left.items()
    assert third != second
    assert device.sent_bytes() == second_bytes + third_bytes < 2 * second_bytes

    assert device.command.terminate() == server.terminate() == 0
    assert main(["check", str(cluster.state_dir)]) == 0
