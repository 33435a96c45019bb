"""Pictures without a class, and classes that come later: what travels, between real processes."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.common.transfer import blob_of
from tests.buckets import s3_service
from tests.integration.test_data_travel_once import SERVER, Device, files, next_rounds
from tests.processes import Cluster

MISSING = ("--set", "run.targets.missing=true")


class PartlySorted(Device):
    """An agent with a folder of digits, some of which nobody has sorted."""

    def add_unlabelled(self, numbers: range) -> None:
        for number in numbers:
            path = self.folder / f"unlabelled/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self._pixels(number)).save(path)

    def tell_labels(self, numbers: range) -> None:
        lines = ["file,target", *(f"{number}.png,{self._labels[number]}" for number in numbers)]
        (self.folder / "labels.csv.new").write_text("\n".join(lines))
        (self.folder / "labels.csv.new").rename(self.folder / "labels.csv")


def test_only_new_targets_travel_and_they_outlive_every_process(cluster: Cluster) -> None:
    device = PartlySorted(cluster)
    server = cluster.server(*SERVER, *MISSING)
    device.add(range(100))
    device.add_unlabelled(range(100, 200))
    device.start()
    device.command.wait_for(r"have no target yet, and are not trained on")
    next_rounds(cluster, device.command)
    shard_bytes = device.sent_bytes()
    assert shard_bytes == sum(files(device.shards).values()) > 64 * 150
    num_examples = cluster.report(1)["agents"][0]["num_examples"]

    device.tell_labels(range(100, 200))
    device.command.wait_for("the data have changed")
    next_rounds(cluster, device.command)
    late_bytes = files(device.shards)["000001.targets"]
    assert device.sent_bytes() == shard_bytes + late_bytes < shard_bytes * 1.3
    assert last_report(cluster)["agents"][0]["num_examples"] > num_examples + 70

    for command in (device.command, server):
        command.kill()
    server = cluster.server(*SERVER, *MISSING)
    device.start()
    next_rounds(cluster, device.command)
    assert device.sent_bytes() == 0
    assert device.command.terminate() == server.terminate() == 0
    assert main(["check", str(cluster.state_dir)]) == 0

    forgetting = cluster.forget("edge-1")
    assert forgetting.wait() == 0, forgetting.output
    kept = [path for path in (cluster.state_dir / "blobs").rglob("*") if path.is_file()]
    late, shard = ((device.shards / name).read_bytes() for name in ("000001.targets", "000001.safetensors"))
    assert not {late, shard} & {path.read_bytes() for path in kept}


@pytest.mark.soak
def test_where_a_bucket_keeps_data_for_a_round_the_targets_are_sent_again_with_their_shard(
    cluster: Cluster,
) -> None:
    with s3_service() as service:
        url, device = service.new_bucket(), PartlySorted(cluster)
        keys = (*SERVER, *MISSING, "--blobs", url, "--set", 'run.retain_data="round"')
        server = cluster.server(*keys, "--blob-cache-bytes", 0)
        device.add(range(100))
        device.add_unlabelled(range(100, 200))
        device.tell_labels(range(100, 150))
        device.start()
        next_rounds(cluster, device.command)
        num_examples = cluster.report(1)["agents"][0]["num_examples"]
        device.tell_labels(range(100, 200))
        device.command.wait_for("the data have changed")
        next_rounds(cluster, device.command)
        (agent,) = last_report(cluster)["agents"]
        assert agent["num_examples"] == agent["num_shared"] > num_examples + 30

        for command in (device.command, server):
            command.kill()
        server = cluster.server(*keys, "--blob-cache-bytes", 0)
        device.start()
        next_rounds(cluster, device.command)
        assert device.sent_bytes() >= sum(files(device.shards).values())
        assert device.command.terminate() == server.terminate() == 0
        assert main(["check", str(cluster.state_dir)]) == 0
        assert cluster.forget("edge-1").wait() == 0
        assert not {blob_of(path).digest for path in device.shards.iterdir()} & Bucket(url).list().keys()


def last_report(cluster: Cluster) -> dict[str, Any]:
    numbers = (int(path.parent.name) for path in Path(cluster.state_dir / "rounds").glob("*/report.json"))
    return cluster.report(max(numbers))
