"""The waiting times for `--help`, for the first model, for the trainer, and for the news of a publication.

    python -m benchmarks.waiting --rounds 5 --repeats 5

The first model: a cloud-server with the preset digits-mlp and two edge-agents are started one after the other
over mutual TLS, by the commands that a user would type, and the time is taken until both agents use the
first round's model. The trainer and the news: for every round, the time is taken from the end of collecting
to the trainer's start on the job, and from the publication to the moment at which a connected agent knows of
it. All processes share one clock.
"""

import asyncio
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.processes import ROOT, processes_in
from benchmarks.product import Server, enrolled, start_agent, start_server
from ecavg.cloud_server.state_dir import StateDir
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics

PROGRAMS = ("cloud_server", "edge_agent")
AGENTS = ("edge-1", "edge-2")
# A round may take so long on a very busy machine.
ROUND_SECONDS = 300.0


def main(argv: list[str] | None = None) -> int:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="of digits-mlp, in one run")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of --help")
    arguments = parser.parse_args(argv)
    machine = figures.machine()
    helped = {program: figures.spread(_help_seconds(program, arguments.repeats)) for program in PROGRAMS}
    with tempfile.TemporaryDirectory(prefix="waiting-") as name:
        rounds = _rounds(Path(name), arguments.rounds)
    result = {"benchmark": "waiting", "help": helped, **rounds, "machine": machine}
    rows = [
        *((f"{program} --help", seconds) for program, seconds in helped.items()),
        ("digits-mlp, from nothing to both agents' new model", rounds["first_model"]),
        ("the trainer's start on a job", rounds["job_taken"]),
        ("an agent's knowledge of a publication", rounds["publication_known"]),
    ]
    figures.emit(result, "waiting", ("", "seconds"), rows)
    return 0


def _help_seconds(program: str, repeats: int) -> list[float]:
    """Return the seconds of each run of `--help`, without the first, which may have to read from the disk."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", program, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _rounds(folder: Path, num_rounds: int) -> dict[str, Any]:
    with processes_in(folder) as processes:
        started = time.perf_counter()
        server = start_server(processes, folder, "", "--rounds", num_rounds, "--min-agents", len(AGENTS))
        for name in AGENTS:
            start_agent(processes, folder, name, server)
        reports = [folder / name / "report.json" for name in AGENTS]
        processes.wait_for(
            "new models", lambda: all(path.exists() for path in reports), seconds=ROUND_SECONDS
        )
        first_model = time.perf_counter() - started
        known = asyncio.run(_publications_known(server, folder, num_rounds))
        closed, published = (_entered(server, phase) for phase in ("aggregating", "published"))
        taken = _jobs_taken(server)
    return {
        "first_model": first_model,
        "job_taken": figures.spread([taken[number] - closed[number] for number in taken]),
        "publication_known": figures.spread([known[number] - published[number] for number in known]),
    }


async def _publications_known(server: Server, folder: Path, num_rounds: int) -> dict[int, float]:
    """Return when a third agent, which contributes nothing, knew of the model of each round.

    The times are in seconds since the epoch. The models published before the agent came are left out.
    """
    identity = await enrolled(server, folder / "watcher", "watcher")
    client = CloudClient(server.address, identity, AgentMetrics())
    await client.join()
    known: dict[int, float] = {}
    async with asyncio.timeout(num_rounds * ROUND_SECONDS):
        async for state in client.watch():
            known.setdefault(state.latest_round, time.time())
            if state.latest_round == num_rounds:
                break
    await client.close()
    # The first state tells of a model that was published before this agent came.
    del known[min(known)]
    return known


def _entered(server: Server, phase: str) -> dict[int, float]:
    """Return when each round entered the phase for the first time, in seconds since the epoch."""
    database_uri = f"file:{StateDir(server.state_dir).database}?mode=ro"
    with closing(sqlite3.connect(database_uri, uri=True)) as database:
        query = "SELECT round, min(at) FROM phase_history WHERE phase = ? GROUP BY round"
        return dict(database.execute(query, (phase,)))


def _jobs_taken(server: Server) -> dict[int, float]:
    """Return when the trainer started on each round's job, in seconds since the epoch."""
    events = map(json.loads, StateDir(server.state_dir).trainer_log.read_text("utf-8").splitlines())
    return {
        event["round"]: datetime.fromisoformat(event["timestamp"]).timestamp()
        for event in events
        if event["event"] == "job_started" and event["round"]
    }


if __name__ == "__main__":
    sys.exit(main())
