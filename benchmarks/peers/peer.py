"""The parts that the peers' benchmarks share: the command, a virtual environment, and marked rounds.

A peer marks its rounds by adding a line with the time to a file when a round begins or ends.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import Meter, Processes, loopback_bytes
from benchmarks.round_trip import MODELS, Measured, parser, show

CACHE = Path("~/.cache/ecavg-benchmarks").expanduser()
INSTALL_SECONDS = 900.0

# A round may take so long for each agent. The first round also starts the processes that do not run yet.
ROUND_SECONDS = 240.0


def run(measure: Callable[[int, str, int], dict[str, Any]], doc: str | None, argv: list[str] | None) -> int:
    """Run a peer's benchmark as a command, and return the exit code.

    Args:
        measure: takes the number of agents, the model and the number of rounds; returns the figures.
        doc: the docstring of the peer's module.
    """
    arguments = parser(doc).parse_args(argv)
    show(measure(arguments.agents, arguments.model, arguments.rounds))
    return 0


def install(package: str, version: str) -> Path:
    """Return the folder `bin` of a virtual environment with the package; make the environment if needed."""
    folder = CACHE / f"{package}-{version}"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"installing {package} {version} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_SECONDS)
        command: list[str | Path] = [
            folder / "bin/python",
            "-m",
            "pip",
            "install",
            "--quiet",
            f"{package}=={version}",
        ]
        subprocess.run(command, check=True, timeout=INSTALL_SECONDS)
        ready.touch()
    return folder / "bin"


def write_shapes(model: str, path: Path) -> int:
    """Write the shapes of the model's float32 tensors as JSON, and return the bytes of these tensors."""
    from benchmarks import workloads

    chosen = MODELS[model]
    tensors = getattr(workloads, model)(chosen.num_classes, chosen.image_shape).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
    path.write_text(json.dumps(shapes), "utf-8")
    return sum(tensor.nbytes for name, tensor in tensors.items() if name in shapes)


def follow(
    processes: Processes,
    families: Mapping[str, int],
    marks: Path,
    num_rounds: int,
    *,
    num_agents: int,
    model_bytes: int,
) -> Measured:
    """Measure the rounds from the end of the first round to the end of the last.

    Args:
        families: the ids of the measured processes by name; each is measured with all its descendants.
        marks: the file to which the peer adds a line when the first round begins, and when a round ends.

    Raises:
        RuntimeError: a process failed, or a round took too long.
    """

    def times() -> list[float]:
        lines = marks.read_text("utf-8").split("\n")[:-1] if marks.exists() else []
        return [float(line) for line in lines]

    def until_ended(number: int) -> None:
        seconds = ROUND_SECONDS * num_agents
        processes.wait_for(f"end of round {number}", lambda: len(times()) > number, seconds=seconds)

    until_ended(1)
    meter, bytes_before = Meter(families=families), loopback_bytes()
    meter.begin()
    until_ended(num_rounds)
    usage, bytes_after = meter.end(), loopback_bytes()
    ends = times()[1 : num_rounds + 1]
    return Measured(
        wall_seconds=[after - before for before, after in pairwise(ends)],
        phases={},
        usage=usage,
        wire_bytes=bytes_after - bytes_before,
        model_bytes=model_bytes,
    )
