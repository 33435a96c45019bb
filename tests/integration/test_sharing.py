"""What of agents' images comes to the server, and how long it stays there: bytes between real processes."""

from pathlib import Path

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.common.shards import read_shard
from tests.integration.test_data_travel_once import next_rounds, sent
from tests.processes import Cluster, Command, until

QUICK = ("--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")


def images_in(folder: Path) -> set[bytes]:
    return {image.tobytes() for path in folder.glob("*.safetensors") for image in read_shard(path).inputs}


def contents_of(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


def agent(cluster: Cluster, number: int, count: int, share_data: object) -> Command:
    return cluster.agent(
        f"edge-{number}", "--data", "tests.faults.runs:blobs", "--partition", f"{number}/{count}",
        "--share-data", share_data, "--metrics-port", 0,
    )  # fmt: skip


def test_only_what_agents_share_comes_to_the_server(cluster: Cluster) -> None:
    server = cluster.server("--rounds", 2, "--min-agents", 3, *QUICK)
    agents = [agent(cluster, number, 3, share) for number, share in enumerate(("all", 0.5, "none"), 1)]
    assert [each.wait() for each in agents] == [0, 0, 0]
    assert server.wait() == 0
    folders = [cluster.folder / f"edge-{number}" for number in (1, 2, 3)]
    shared = [images_in(folder / "shards") for folder in folders]
    private = [images_in(folder / "private") for folder in folders]
    assert not private[0]
    assert not shared[2]
    assert 0.3 * len(private[2]) < len(shared[1]) < 0.7 * len(private[2])
    at_server = contents_of(cluster.state_dir)
    assert all(image in at_server for image in shared[0] | shared[1])
    assert not any(image in at_server for image in private[1] | private[2])
    for number in (1, 2):
        report = cluster.report(number)
        assert [each["num_shared"] for each in report["agents"]] == [len(images) for images in shared]
        assert [each["num_examples"] for each in report["agents"]] == [
            len(ours) + len(own) for ours, own in zip(shared, private, strict=True)
        ]
        assert report["num_shared"] == sum(map(len, shared))
        assert "accuracy_published" in report
    assert f"shared are {len(shared[1])} of" in agents[1].output
    assert "no image leaves this device" in agents[2].output
    assert main(["check", str(cluster.state_dir)]) == 0


def test_round_to_which_nobody_gives_data_publishes_the_average(cluster: Cluster) -> None:
    server = cluster.server("--rounds", 2, "--min-agents", 2, *QUICK)
    agents = [agent(cluster, number, 2, "none") for number in (1, 2)]
    assert [each.wait() for each in agents] == [0, 0]
    assert server.wait() == 0
    for number in (1, 2):
        report = cluster.report(number)
        assert (report["num_shared"], report["start"], report["published"]) == (0, "aligned", "start")
        assert not {"candidates", "accuracy_fine_tuned", "accuracy_published"} & report.keys()
        assert all("accuracy_after" in each for each in report["agents"])  # they measure it, and decide
    private = images_in(cluster.folder / "edge-1/private") | images_in(cluster.folder / "edge-2/private")
    at_server = contents_of(cluster.state_dir)
    assert private
    assert not any(image in at_server for image in private)
    assert main(["check", str(cluster.state_dir)]) == 0


@pytest.mark.soak
def test_agent_that_shares_less_from_now_on_sends_nothing_more(cluster: Cluster) -> None:
    server = cluster.server("--rounds", 0, "--min-agents", 1, *QUICK)
    device = agent(cluster, 1, 1, "all")
    next_rounds(cluster, device)
    device.terminate()
    everything = images_in(cluster.folder / "edge-1/shards")
    device = agent(cluster, 1, 1, "none")
    device.wait_for(r"no longer shared.*cloud-server forget edge-1")
    url = device.wait_for(r"metrics on (http://\S+?/metrics)")[1]
    next_rounds(cluster, device)
    assert sent(url, "data") == 0
    assert sent(url, "weights") > 0
    assert images_in(cluster.folder / "edge-1/private") == everything
    at_server = contents_of(cluster.state_dir)
    assert all(image in at_server for image in everything)  # as of old: the operator is asked to delete them
    device.terminate()
    server.terminate()


def test_data_kept_for_a_round_are_gone_after_it_and_sent_again_for_the_next(cluster: Cluster) -> None:
    settings = ("--min-agents", 2, "--set", 'run.retain_data="round"', *QUICK)
    server = cluster.server("--rounds", 2, *settings)
    agents = [agent(cluster, number, 2, "all") for number in (1, 2)]
    url = agents[0].wait_for(r"metrics on (http://\S+?/metrics)")[1]
    size = 0

    def num_sent() -> float:
        """How often the first agent has sent its data."""
        nonlocal size
        size = size or sum(path.stat().st_size for path in (cluster.folder / "edge-1/shards").glob("*"))
        counts.append(sent(url, "data") / size if size else 0)
        return counts[-1]

    counts: list[float] = []
    until(lambda: num_sent() >= 2, agents[0])
    assert max(counts) == 2  # not asked once more: the agent may have left in the meantime
    assert [each.wait() for each in agents] == [0, 0]
    assert server.wait() == 0
    assert "until their round is over" in agents[0].output
    images = images_in(cluster.folder / "edge-1/shards") | images_in(cluster.folder / "edge-2/shards")
    assert len(images) > 300
    at_server = contents_of(cluster.state_dir)
    assert not any(image in at_server for image in images)
    assert all(cluster.report(number)["accuracy_published"] for number in (1, 2))
    assert main(["check", str(cluster.state_dir)]) == 0

    server = cluster.server("--rounds", 3, *settings)  # and after a restart
    agents = [agent(cluster, number, 2, "all") for number in (1, 2)]
    assert [each.wait() for each in agents] == [0, 0]
    assert server.wait() == 0
    assert cluster.report(3)["accuracy_published"]
