"""Pictures without a class, and classes that come later: what travels, between real processes."""

from pathlib import Path

from PIL import Image

from ecavg.cloud_server.__main__ import main
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


def last_report(cluster: Cluster) -> dict[str, object]:
    numbers = (int(path.parent.name) for path in Path(cluster.state_dir / "rounds").glob("*/report.json"))
    return cluster.report(max(numbers))
