"""A crowd of agents on one server: what each of them costs, and how long each of them waits.

    python -m benchmarks.agents --agents 100 --rounds 3 --tls

The agents are those of benchmarks/crowd.py, in one process for each core. All of them contribute to every
round, so that all come at once. Their enrolment is not measured. The server's processor time is counted from
its ready line to its end, without the trainer.
"""

import json
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.crowd import Life, Plan, calls_of, live
from benchmarks.processes import Usage, processes_in, usage_of
from benchmarks.product import Server, start_server
from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import tls

# The weights of this model are a file of 20 KB. The trainer averages, and does not train.
RUN = """
hidden_units = 64
candidates = ["average"]
max_norm_ratio = 0
[run.fine_tune]
epochs = 0
"""
END_SECONDS = 600.0
SAMPLE_SECONDS = 0.05


def main(argv: list[str] | None = None) -> int:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--agents", type=int, default=100, metavar="N", help="number of agents")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="number of rounds")
    parser.add_argument("--tls", action="store_true", help="mutual TLS in place of plaintext")
    parser.add_argument(
        "--leaving", type=float, default=0.05, metavar="SHARE", help="who hangs up each round"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of who hangs up, and when")
    arguments = parser.parse_args(argv)
    machine = figures.machine()
    with tempfile.TemporaryDirectory() as name, processes_in(Path(name)) as processes:
        flags = [] if arguments.tls else ["--insecure"]
        flags += ["--rounds", arguments.rounds, "--min-agents", arguments.agents, "--log-level", "warning"]
        server = start_server(processes, Path(name), RUN, *flags)
        plans = _plans(arguments, server)
        with _metered(server.pid) as usage:
            lives = _lives(plans)
            processes.wait_for_end("cloud-server", seconds=END_SECONDS)
        result = {
            "benchmark": "agents",
            "agents": arguments.agents,
            "rounds": arguments.rounds,
            "tls": arguments.tls,
            **_cost(usage[-1], lives, arguments.agents * arguments.rounds),
            "calls": {call: _percentiles(seconds) for call, seconds in calls_of(lives)},
            "news_known": _percentiles(_news(lives, _published(server))),
            "faults": _faults(lives, server, arguments.rounds),
            "machine": machine,
        }
    rows = [(call, each["p50"], each["p99"], each["max"]) for call, each in result["calls"].items()]
    title = f"{arguments.agents} agents, {result['server_cpu_ms_per_contribution']:.3g} ms each and round"
    figures.emit(result, title, ("call", "p50, s", "p99, s", "longest, s"), rows)
    return 0


def _plans(arguments: Any, server: Server) -> list[Plan]:
    names = [f"agent-{number:05}" for number in range(1, arguments.agents + 1)]
    materials = _enrolled(server, names) if arguments.tls else None
    num_processes = min(len(os.sched_getaffinity(0)), len(names))
    return [
        Plan(
            server.address,
            tuple(names[first::num_processes]),
            tuple(materials[first::num_processes]) if materials else None,
            arguments.rounds,
            arguments.leaving,
            arguments.seed,
        )
        for first in range(num_processes)
    ]


def _enrolled(server: Server, names: Sequence[str]) -> list[tls.TlsMaterial]:
    """Enroll the agents at the server's own records, without a call."""
    materials = []
    with closing(Authority(StateDir(server.state_dir).tls)) as authority:
        token = tls.JoinToken.parse(authority.create_token(uses=len(names), ttl_seconds=3600))
        for name in names:
            key = tls.new_key()
            certificate = authority.enroll(token.token_id, tls.make_request(key, name))
            materials.append(tls.TlsMaterial(tls.pem(key), certificate, authority.ca_certificate))
        # Every handshake would otherwise read the roots of a live token, too.
        authority.revoke_token(token.token_id)
    return materials


def _lives(plans: Sequence[Plan]) -> list[Life]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(plans), mp_context=context) as pool:
        crowds = [pool.submit(live, plan) for plan in plans]
        # With an agent missing, the rounds of the others would never end.
        for done in as_completed(crowds):
            if error := done.exception():
                for process in multiprocessing.active_children():
                    process.kill()
                raise error
        return [life for crowd in crowds for life in crowd.result()]


@contextmanager
def _metered(pid: int) -> Iterator[list[Usage]]:
    """Measure a process that may end before the context does; its last figures are the last of the list."""
    found, is_over = [usage_of(pid)], threading.Event()
    before = found[0].cpu_seconds

    def sample() -> None:
        with suppress(OSError):
            while not is_over.wait(SAMPLE_SECONDS):
                usage = usage_of(pid)
                # A process that has ended, and that nobody has waited for, has no memory.
                if usage.peak_mib:
                    found.append(usage._replace(cpu_seconds=usage.cpu_seconds - before))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def _cost(usage: Usage, lives: Sequence[Life], num_contributions: int) -> dict[str, Any]:
    return {
        "wall_seconds": max(life.ended_at for life in lives) - min(life.began_at for life in lives),
        "server_cpu_seconds": usage.cpu_seconds,
        "server_cpu_ms_per_contribution": 1000 * usage.cpu_seconds / num_contributions,
        "server_peak_mib": usage.peak_mib,
        "events_per_contribution": sum(life.num_events for life in lives) / num_contributions,
        "comebacks": sum(life.num_comebacks for life in lives),
        "broken_off": sum(life.num_broken_off for life in lives),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max": ordered[-1],
    }


def _published(server: Server) -> dict[int, float]:
    """Return when each round was published, in seconds since the epoch."""
    with closing(sqlite3.connect(StateDir(server.state_dir).database)) as database:
        query = "SELECT round, min(at) FROM phase_history WHERE phase = 'published' GROUP BY round"
        return dict(database.execute(query))


def _news(lives: Sequence[Life], published: dict[int, float]) -> list[float]:
    """Return how long after each publication the agents knew of it, those that were connected then."""
    known = ((number, at) for life in lives for number, at in life.known_at.items())
    return [at - published[number] for number, at in known if number in published]


def _faults(lives: Sequence[Life], server: Server, num_rounds: int) -> dict[str, int]:
    """Return how many contributions and reports were answered and lost, or counted twice."""
    faults: Counter[str] = Counter(lost=0, twice=0, reports_lost=0, not_accepted=0, without_end=0)
    for number in range(1, num_rounds + 1):
        report = json.loads((StateDir(server.state_dir).round(number) / "report.json").read_text("utf-8"))
        counted = Counter(agent["agent_id"] for agent in report["agents"])
        reported = {agent["agent_id"] for agent in report["agents"] if "accuracy_after" in agent}
        for life in lives:
            is_accepted = life.outcomes.get(number) == "OUTCOME_ACCEPTED"
            faults["not_accepted"] += not is_accepted
            faults["lost"] += is_accepted and not counted[life.name]
            faults["twice"] += counted[life.name] > 1
            faults["reports_lost"] += number in life.reported and life.name not in reported
    faults["without_end"] = sum(not life.saw_the_end for life in lives)
    return dict(faults)


if __name__ == "__main__":
    sys.exit(main())
