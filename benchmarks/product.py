"""The product's own processes, started as a user would start them."""

import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Processes

START_SECONDS = 300.0  # PyTorch is imported, and the run's model built


class Server(NamedTuple):
    pid: int
    port: int
    state_dir: Path


def start_server(processes: Processes, folder: Path, run: str, *flags: object) -> Server:
    """A cloud-server that is ready.

    Args:
        folder: its state directory is made here.
        run: the TOML of the run's table.
    """
    configuration, state_dir = folder / "run.toml", folder / "server"
    configuration.write_text(f"[run]\n{run}", "utf-8")
    command = [sys.executable, "-m", "cloud_server", "--config", configuration, "--state-dir", state_dir]
    addresses = ("--host", "127.0.0.1", "--port", 0, "--http-port", 0)
    pid = processes.start("cloud-server", [*command, *addresses, *flags])
    ready = processes.wait_for_output("cloud-server", r"ready: agents on \S+?:(\d+),", seconds=START_SECONDS)
    return Server(pid, int(ready), state_dir)


def start_agent(processes: Processes, folder: Path, name: str, server: Server, *flags: object) -> int:
    """An edge-agent; its process id."""
    command = [sys.executable, "-m", "edge_agent", "--server", f"127.0.0.1:{server.port}"]
    return processes.start(name, [*command, "--agent-id", name, "--state-dir", folder / name, *flags])
