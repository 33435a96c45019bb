"""The cost of a round without training: real processes on loopback, K agents that send untrained weights.

    python -m benchmarks.round_trip --agents 2 --model resnet50 --rounds 4

A cloud-server, its trainer and K edge-agents run whole rounds. The run's configuration switches training off:
no epochs, the plain average as the only candidate, four images for each agent. Everything else happens as in
any round: agents download the initial weights, and upload weights and data, which the server checks and makes
durable. The trainer averages, evaluates and writes the model, and the server publishes the model. Agents
download, evaluate and apply the model, and report. The figures are of the rounds after the first publication,
up to the last.
"""

import argparse
import json
import sqlite3
import sys
import tempfile
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks import figures
from benchmarks.processes import (
    Meter,
    Processes,
    Usage,
    children,
    loopback_bytes,
    own_network,
    processes_in,
)
from benchmarks.product import Server, start_agent, start_server
from ecavg.cloud_server.state_dir import StateDir

FIRST_ROUND_SECONDS = 300.0
# A round may take so long for each agent.
ROUND_SECONDS = 120.0


class Model(NamedTuple):
    """The images that a model takes, and the number of its classes."""

    # The name of the images' factory in workloads.py.
    images: str
    image_shape: tuple[int, int, int]
    num_classes: int


# Each key is also the name of the model's factory in workloads.py.
MODELS = {
    "resnet50": Model("colour_images", (3, 32, 32), 1000),
    "mobilenet_v2": Model("colour_images", (3, 32, 32), 1000),
    "tiny": Model("tiny_images", (1, 2, 5), 10),
}


class Measured(NamedTuple):
    """The figures of a run from its first publication to its last."""

    # The seconds of each round.
    wall_seconds: list[float]
    # The mean seconds of each phase, as the server reports them.
    phases: dict[str, float]
    # The usage by process, of all rounds together.
    usage: dict[str, Usage]
    # The bytes on the wire, of all rounds together.
    wire_bytes: int
    model_bytes: int


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    show(measure(arguments.agents, arguments.model, arguments.rounds))
    return 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that this command shares with the peers' commands."""
    parser = figures.argument_parser(description)
    parser.add_argument("--agents", type=_positive, default=2, metavar="K", help="how many")
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="whose weights travel")
    parser.add_argument(
        "--rounds", type=_several, default=4, metavar="R", help="in all; the first is not counted"
    )
    return parser


def measure(num_agents: int, model: str, num_rounds: int) -> dict[str, Any]:
    """Run the rounds, and return the figures as they are printed."""
    machine = figures.machine()
    is_own_network = own_network()
    with tempfile.TemporaryDirectory(prefix="round-trip-") as name, processes_in(Path(name)) as processes:
        measured = _run(processes, Path(name), num_agents, model, num_rounds)
    return result(
        "ecavg",
        num_agents,
        model,
        measured,
        server=("cloud-server", "trainer"),
        machine=machine,
        wire_bytes=measured.wire_bytes if is_own_network else None,
    )


def result(
    system: str,
    num_agents: int,
    model: str,
    measured: Measured,
    *,
    server: tuple[str, ...],
    machine: dict[str, Any],
    wire_bytes: int | None,
    **extra: Any,
) -> dict[str, Any]:
    """Return the figures as they are printed, with the same keys for every system.

    Args:
        server: the names of the processes that make up the server.
        wire_bytes: the bytes on the wire; None if this machine does not permit a network namespace, in which
            alone they can be counted.
    """
    num_rounds = len(measured.wall_seconds)
    per_process = {
        name: {"cpu_seconds": usage.cpu_seconds / num_rounds, "peak_mib": usage.peak_mib}
        for name, usage in measured.usage.items()
    }
    return {
        "benchmark": "round_trip",
        "system": system,
        "model": model,
        "model_bytes": measured.model_bytes,
        "agents": num_agents,
        "steady_rounds": num_rounds,
        "wall_seconds": figures.spread(measured.wall_seconds),
        "server_cpu_seconds": sum(per_process[name]["cpu_seconds"] for name in server),
        "server_peak_mib": sum(per_process[name]["peak_mib"] for name in server),
        "wire_bytes": wire_bytes and wire_bytes / num_rounds,
        "phases_seconds": measured.phases,
        "processes": per_process,
        **extra,
        "machine": machine,
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    wire = result["wire_bytes"]
    ideal = 2 * result["agents"] * result["model_bytes"]
    rows: list[tuple[object, ...]] = [
        ("wall seconds", result["wall_seconds"], ""),
        ("server, in all", result["server_cpu_seconds"], result["server_peak_mib"]),
        *((name, usage["cpu_seconds"], usage["peak_mib"]) for name, usage in result["processes"].items()),
        ("MiB on the wire", wire / 2**20 if wire else "not counted", ""),
        ("of the weights, both ways", wire / ideal if wire else "not counted", ""),
    ]
    title = f"one round of {result['system']}: {result['model']}, {result['agents']} agents"
    figures.emit(result, title, ("", "seconds (CPU)", "peak MiB"), rows)


def _run(processes: Processes, folder: Path, num_agents: int, model: str, num_rounds: int) -> Measured:
    factory, images = f"benchmarks.workloads:{model}", f"benchmarks.workloads:{MODELS[model].images}"
    size = ("--rounds", num_rounds, "--min-agents", num_agents)
    server = start_server(processes, folder, _configuration(model, factory), *size)
    (trainer_pid,) = children(server.pid)
    pids = {"cloud-server": server.pid, "trainer": trainer_pid}
    for name in (f"agent-{index}" for index in range(1, num_agents + 1)):
        workload = ("--data", images, "--allow-factory", factory)
        pids[name] = start_agent(processes, folder, name, server, *workload)

    def published(number: int, seconds: float) -> dict[str, Any]:
        return processes.wait_for(
            f"model of round {number}", lambda: _report(server, number), seconds=seconds * num_agents
        )

    published(1, FIRST_ROUND_SECONDS)
    meter, bytes_before = Meter(single=pids), loopback_bytes()
    meter.begin()
    reports = [published(number, ROUND_SECONDS) for number in range(2, num_rounds + 1)]
    usage, bytes_after = meter.end(), loopback_bytes()
    return Measured(
        wall_seconds=_round_seconds(server),
        phases={name: mean(each["seconds"][name] for each in reports) for name in reports[0]["seconds"]},
        usage=usage,
        wire_bytes=bytes_after - bytes_before,
        model_bytes=reports[-1]["weights"]["bytes"],
    )


def _configuration(model: str, factory: str) -> str:
    """Return the TOML text of the run's `[run]` table.

    The run clips nothing, because one number in these weights is drawn at random and may be an outlier.
    """
    chosen = MODELS[model]
    return f"""
model = "{factory}"
dataset = "made-up"
num_classes = {chosen.num_classes}
image_shape = {list(chosen.image_shape)}
candidates = ["average"]
recompute_statistics = false
max_norm_ratio = 0
apply = "always"
pretrain.epochs = 0
fine_tune.epochs = 0
"""


def _report(server: Server, number: int) -> dict[str, Any] | None:
    """Return the server's report on the round; None if the round is not over.

    Raises:
        RuntimeError: the round published no model.
    """
    path = StateDir(server.state_dir).report(number)
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if report["outcome"] != "published":
        raise RuntimeError(f"round {number} published nothing: {report.get('failure')}")
    return report


def _round_seconds(server: Server) -> list[float]:
    """Return the seconds from each publication to the next, by the server's clock."""
    query = "SELECT at FROM phase_history WHERE phase = 'published' ORDER BY at"
    database_uri = f"file:{StateDir(server.state_dir).database}?mode=ro"
    with closing(sqlite3.connect(database_uri, uri=True)) as database:
        times = [at for (at,) in database.execute(query)]
    return [after - before for before, after in pairwise(times)]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _several(text: str) -> int:
    if int(text) < 2:
        raise ValueError("the first is not counted")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
