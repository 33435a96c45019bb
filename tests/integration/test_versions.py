"""Agents of other versions and a server of this one, through the real commands."""

import subprocess
import sys

from ecavg.common import rpc
from ecavg.common.config import RunConfig
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN, Versions
from tests.processes import ROOT, WAIT_SECONDS, Cluster

# An agent that is like those of this version, but says that it speaks others.
OTHER_AGENT = """
import sys
from ecavg.common import protocol
protocol.SPOKEN = protocol.Versions(int(sys.argv[1]), int(sys.argv[2]))
from ecavg.edge_agent.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def agent_speaking(cluster: Cluster, spoken: Versions, name: str) -> subprocess.CompletedProcess[str]:
    """Run an agent to its end."""
    cluster.enroll(name)
    where = ("--server", f"127.0.0.1:{cluster.port}", "--state-dir", str(cluster.folder / name))
    return subprocess.run(
        [sys.executable, "-c", OTHER_AGENT, *map(str, spoken), *where, "--agent-id", name],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


async def test_fleet_of_three_versions_meets_one_server(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 1, "--rounds", 1)

    # The agent of a version that this server does not speak ends at once, and both sides say what to do.
    future = agent_speaking(cluster, Versions(SPOKEN.newest + 1, SPOKEN.newest + 2), "future")
    line = "the agent speaks protocol 2 to 3, the server 1: update the server"
    assert future.returncode == 2, future.stderr
    assert future.stderr.strip().splitlines()[-1] == f"edge-agent: {line}"
    assert line in server.output

    # An agent from before the agreement names one version, and does not know the field of the answer.
    identity = cluster.enroll("old")
    async with rpc.channel(f"127.0.0.1:{cluster.port}", identity.material) as channel:
        stub = pb_grpc.ECAvgStub(channel)  # type: ignore[no-untyped-call]
        reply = await stub.Join(pb.JoinRequest(protocol_version=1))
    assert (reply.protocol_version, RunConfig.model_validate_json(reply.run_json).model) == (1, "mlp")

    # The agent of the next version speaks this one as well, and gets through the round.
    following = agent_speaking(cluster, Versions(SPOKEN.oldest, SPOKEN.newest + 1), "following")
    assert following.returncode == 0, following.stderr
    assert cluster.report()["outcome"] == "published"
