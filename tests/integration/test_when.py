"""Rounds that open when there is something new, with real commands and a folder of digits."""

import json

from tests.integration.test_data_travel_once import Device
from tests.integration.test_round import get
from tests.processes import Cluster, until

SERVER = (
    "--min-agents", 1, "--rounds", 2, "--open-round-when-new-examples", 40,
    "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
)  # fmt: skip
AGENT = ("--ready-seconds", 0.2, "--min-new-examples", 30)


def test_round_opens_for_new_pictures_though_server_and_agent_start_again(cluster: Cluster) -> None:
    device = Device(cluster)
    device.add(range(200))
    server = cluster.server(*SERVER)
    agent = cluster.agent("edge-1", "--data", device.folder, *AGENT)
    agent.wait_for("the next round opens when the agents have 40 new examples")
    agent.wait_for("not ready: there are 0 new examples; taking part with 30 of them")
    assert [each.terminate() for each in (agent, server)] == [0, 0]

    device.add(range(200, 235))
    server = cluster.server(*SERVER)
    agent = cluster.agent("edge-1", "--data", device.folder, *AGENT)

    def waiting() -> str:
        return str(json.loads(get(f"http://127.0.0.1:{cluster.http_port}/api/status"))["waiting"])

    # These are enough for the agent, but not for the server.
    until(lambda: "have 40 new examples: 35 so far" in waiting(), server)
    device.add(range(235, 240))
    assert [each.wait() for each in (agent, server)] == [0, 0]
    (first,), (second,) = (cluster.report(number)["agents"] for number in (1, 2))
    assert second["num_examples"] > first["num_examples"]
