"""The round of benchmarks/round_trip.py on Flower: a SuperLink and K SuperNodes, plaintext, state in memory.

python -m benchmarks.peers.flower --agents 2 --model resnet50 --rounds 4
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.peers import peer
from benchmarks.processes import free_port, own_network, processes_in
from benchmarks.round_trip import result

VERSION = "1.41.0"
APP = Path(__file__).parent / "flower_app"
NOTES = (
    "Flower starts a process for every message, and isolates the app from the connection",
    "plaintext; state in memory, its default; objects are held against their SHA-256",
)


def main(argv: list[str] | None = None) -> int:
    return peer.run(measure, __doc__, argv)


def measure(num_agents: int, model: str, num_rounds: int) -> dict[str, Any]:
    """Run the rounds on Flower, and return the figures as they are printed."""
    bin_dir = peer.install("flwr", VERSION)
    machine = figures.machine()
    is_own_network = own_network()
    with tempfile.TemporaryDirectory(prefix="flower-") as name, processes_in(Path(name)) as processes:
        folder = Path(name)
        marks, shapes = folder / "marks", folder / "shapes.json"
        model_bytes = peer.write_shapes(model, shapes)
        shutil.copytree(APP, folder / "app")
        env = {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            # Flower looks here for the programs that it starts.
            "PATH": f"{bin_dir}:/usr/local/bin:/usr/bin:/bin",
        }
        port = free_port()
        (folder / "home").mkdir()
        connection = f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (folder / "home/config.toml").write_text(f'[superlink]\ndefault = "bench"\n{connection}', "utf-8")
        families = {
            "superlink": processes.start("superlink", [
                bin_dir / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                "--host", "127.0.0.1", "--port", port,
            ], env=env)
        }  # fmt: skip
        for index in range(1, num_agents + 1):
            families[f"agent-{index}"] = processes.start(f"agent-{index}", [
                bin_dir / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--host", "127.0.0.1", "--port", free_port(),
            ], env=env)  # fmt: skip
        config = f"shapes='{shapes}' marks='{marks}' num-agents={num_agents} num-rounds={num_rounds}"
        processes.start("flwr-run", [
            "/bin/sh", "-c", 'for _ in 1 2 3 4 5 6 7 8; do "$@" && exit; sleep 2; done; exit 1', "flwr-run",
            bin_dir / "flwr", "run", folder / "app", "bench", "--run-config", config,
        ], env=env)  # fmt: skip
        measured = peer.follow(
            processes, families, marks, num_rounds, num_agents=num_agents, model_bytes=model_bytes
        )
    return result(
        f"flower {VERSION}",
        num_agents,
        model,
        measured,
        server=("superlink",),
        machine=machine,
        wire_bytes=measured.wire_bytes if is_own_network else None,
        notes=NOTES,
    )


if __name__ == "__main__":
    sys.exit(main())
