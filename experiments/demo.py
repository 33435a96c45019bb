"""`make demo`: one real cloud-server, two real edge-agents, one round of digits, a table or a time series.

Server and agents are processes of their own on loopback, started by the commands that a user would type. They
leave their files in the folder `.demo`.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir

FOLDER = Path(".demo")
AGENTS = ("edge-1", "edge-2")
# The preset of each task.
PRESETS = {
    "classification": "digits-mlp",
    "regression": "diabetes-mlp",
    "table": "breast-cancer-mlp",
    "series": "sunspots-gru",
}
TIMEOUT_SECONDS = 300.0
STOP_SECONDS = 10.0

console = Console()


class Stop:
    """A note that SIGINT or SIGTERM has come, which the demo checks between two steps.

    If a signal ended the demo in the middle of a step, a process that has just been started would be left
    behind. If a second Ctrl-C ended the clean-up, all processes would be left behind.
    """

    def __init__(self) -> None:
        self._is_wanted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._is_wanted = True

    def check(self) -> None:
        if self._is_wanted:
            raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=PRESETS, default="classification", help="what is learnt")
    preset = PRESETS[parser.parse_args().task]
    stop = Stop()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    started = time.monotonic()
    try:
        with console.status("starting …") as status:
            run_round(status, stop, preset)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except RuntimeError as error:
        console.print(f"demo: {error}", markup=False)
        return 1
    report = json.loads((StateDir(FOLDER / "server").report(1)).read_text("utf-8"))
    show(report)
    console.print(
        f"one round of {report['model']} on {report['dataset']} in {time.monotonic() - started:.1f} s;"
        f" reports, models and logs are in {FOLDER}/"
    )
    return 0


def run_round(status: Status, stop: Stop, preset: str) -> None:
    """Start the three processes, and wait until all of them have ended.

    Raises:
        RuntimeError: a process failed, or took too long.
        KeyboardInterrupt: SIGINT or SIGTERM has come.
    """
    port, http_port = free_ports(2)
    token = join_token(FOLDER / "server", uses=len(AGENTS))
    server = [
        "ecavg.cloud_server", "--preset", preset, "--host", "127.0.0.1", "--port", str(port),
        "--http-port", str(http_port), "--state-dir", str(FOLDER / "server"), "--rounds", "1",
    ]  # fmt: skip
    commands = {"cloud-server": server}
    for agent_id in AGENTS:
        commands[agent_id] = [
            "ecavg.edge_agent", "--server", f"127.0.0.1:{port}", "--agent-id", agent_id,
            "--state-dir", str(FOLDER / agent_id), "--join-token-file", str(token),
        ]  # fmt: skip
    with running(commands) as processes:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(process.poll() is None for process in processes.values()):
            stop.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {TIMEOUT_SECONDS:.0f} s; the logs are in {FOLDER}/")
            for name, process in processes.items():
                if process.poll():
                    last_line = (FOLDER / f"{name}.log").read_text("utf-8").strip().rpartition("\n")[2]
                    raise RuntimeError(f"{name} failed: {last_line}")
            status.update(describe(http_port))
            time.sleep(0.1)


def join_token(state_dir: Path, uses: int) -> Path:
    """Write a join token to a file, and return the file's path.

    Args:
        state_dir: the state directory of the server, which need not have been started yet.
    """
    with closing(Authority(StateDir(state_dir).tls)) as authority:
        token = authority.create_token(uses, ttl_seconds=3600)
    file = state_dir / "join-token"
    file.touch(mode=0o600)
    file.write_text(token, "utf-8")
    return file


@contextmanager
def running(commands: dict[str, list[str]]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start the commands as processes, and end all of them when the context ends."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (FOLDER / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdout=log,
                    stderr=log,
                    env=environment(),
                    start_new_session=True,
                )
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """Return the environment of the processes, which reach each other without the proxy of a company."""
    return {**os.environ, "no_grpc_proxy": "127.0.0.1"}


def describe(http_port: int) -> str:
    """Return one line about the state of the run, as the server's status page has it."""
    try:
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with directly.open(f"http://127.0.0.1:{http_port}/api/status", timeout=1) as reply:
            state: dict[str, Any] = json.load(reply)
    except (OSError, ValueError):
        return "starting the processes …"
    if "round" not in state:
        return "the trainer is warming up …"
    progress = state["progress"]
    detail = f" {progress['done']} of {progress['total']}" if progress else ""
    contributed = sum(agent["outcome"] == "accepted" for agent in state["agents"])
    return (
        f"round {state['round']}: {state['phase'].replace('_', '-')}{detail}"
        f" ({len(state['agents'])} agents joined, {contributed} contributed)"
    )


def show(report: dict[str, Any]) -> None:
    """Print the table of the figures before and after the round."""
    table = Table(title=f"{report.get('metric', 'accuracy')} on held-out data")
    field = "score" if "metric" in report else "accuracy"
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for agent in report["agents"]:
        before, after = agent.get(f"{field}_before"), agent.get(f"{field}_after")
        table.add_row(agent["agent_id"], figure(before), figure(after))
    table.add_section()
    start, published = report["candidates"].get(report["start"]), report[f"{field}_published"]
    table.add_row("cloud (start → published)", figure(start), figure(published))
    console.print(table)


def figure(score: float | None) -> str:
    """Format the figure for the table; an agent that lost its connection has reported none."""
    return "-" if score is None else f"{score:.4f}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
