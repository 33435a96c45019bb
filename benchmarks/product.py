"""The product's own processes, started by the commands that a user would type."""

import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Processes
from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.tls import JoinToken
from ecavg.edge_agent.enrolment import Enrolment, enroll
from ecavg.edge_agent.identity import Identity

# A start imports PyTorch and builds the run's model.
START_SECONDS = 300.0


class Server(NamedTuple):
    pid: int
    port: int
    state_dir: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def join_token(self) -> str:
        """Return a join token for one agent."""
        with closing(Authority(StateDir(self.state_dir).tls)) as authority:
            return authority.create_token(uses=1, ttl_seconds=3600)


def start_server(processes: Processes, folder: Path, run: str, *flags: object) -> Server:
    """Start a cloud-server, and return it when it is ready.

    Args:
        folder: the folder in which the server's state directory is made.
        run: the TOML text of the `[run]` table.
    """
    configuration, state_dir = folder / "run.toml", folder / "server"
    configuration.write_text(f"[run]\n{run}", "utf-8")
    command = [
        sys.executable,
        "-m",
        "ecavg.cloud_server",
        "--config",
        configuration,
        "--state-dir",
        state_dir,
    ]
    addresses = ("--host", "127.0.0.1", "--port", 0, "--http-port", 0)
    pid = processes.start("cloud-server", [*command, *addresses, *flags])
    ready = processes.wait_for_output("cloud-server", r"ready: agents on \S+?:(\d+),", seconds=START_SECONDS)
    return Server(pid, int(ready), state_dir)


async def enrolled(server: Server, folder: Path, name: str) -> Identity:
    """Enroll an agent, and return its identity for a CloudClient in this process.

    Args:
        folder: the folder in which the identity's files are made.
    """
    token = JoinToken.parse(server.join_token())
    enrolment = Enrolment(folder / "tls", name, token, server.address)
    return await enroll(enrolment, server.address, print)


def start_agent(processes: Processes, folder: Path, name: str, server: Server, *flags: object) -> int:
    """Start an edge-agent, which enrolls with a join token, and return its process id."""
    token = folder / f"{name}.token"
    token.touch(mode=0o600)
    token.write_text(server.join_token(), "utf-8")
    command = [sys.executable, "-m", "ecavg.edge_agent", "--server", server.address]
    state = ("--agent-id", name, "--state-dir", folder / name, "--join-token-file", token)
    return processes.start(name, [*command, *state, *flags])
