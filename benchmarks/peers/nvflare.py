"""The round of benchmarks/round_trip.py on NVFlare: a server and K sites in POC mode, with mutual TLS.

    python -m benchmarks.peers.nvflare --agents 2 --model resnet50 --rounds 4

PyTorch tensors are sent directly (`ExchangeFormat.PYTORCH`). NVFlare uses the PyTorch of this project's
environment, so that its two gigabytes are not downloaded a second time.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.peers import peer
from benchmarks.processes import own_network, processes_in
from benchmarks.round_trip import result

VERSION = "2.9.0"
JOB = Path(__file__).parent / "nvflare_job"
PROVISION_SECONDS = 120.0
START_SECONDS = 120.0
NOTES = (
    "NVFlare relays through a parent process on either side, with a process for each job",
    "mutual TLS; the server writes and flushes the model of each round",
)


def main(argv: list[str] | None = None) -> int:
    return peer.run(measure, __doc__, argv)


def measure(num_agents: int, model: str, num_rounds: int) -> dict[str, Any]:
    """Run the rounds on NVFlare, and return the figures as they are printed."""
    bin_dir = peer.install("nvflare", VERSION)
    _lend_torch(bin_dir)
    machine = figures.machine()
    # NVFlare's ports are fixed. In a network of its own, no other program can hold them.
    is_own_network = own_network()
    with tempfile.TemporaryDirectory(prefix="nvflare-") as name, processes_in(Path(name)) as processes:
        folder = Path(name)
        marks, shapes = folder / "marks", folder / "shapes.json"
        model_bytes = peer.write_shapes(model, shapes)
        env = {"HOME": str(folder), "PATH": f"{bin_dir}:/usr/local/bin:/usr/bin:/bin"}
        kits = _provision(bin_dir, folder, num_agents, env)
        sites = [f"site-{index}" for index in range(1, num_agents + 1)]
        families = {}
        for site in ["server", *sites]:
            command = ["/bin/bash", kits / site / "startup/sub_start.sh", "--once"]
            families[site] = processes.start(site, command, env=env)
        for site in sites:
            registered = "(Successfully registered)"
            processes.wait_for_output(site, registered, seconds=START_SECONDS * num_agents)
        job = shutil.copytree(JOB, folder / "job")
        processes.start("submit", [
            bin_dir / "python", "submit.py", "--agents", num_agents,
            # The job marks the beginnings of rounds, so the last round ends where one more round begins.
            "--rounds", num_rounds + 1,
            "--shapes", shapes, "--marks", marks, "--startup-kit", kits / "admin@nvidia.com",
        ], env=env, cwd=job)  # fmt: skip
        measured = peer.follow(
            processes, families, marks, num_rounds, num_agents=num_agents, model_bytes=model_bytes
        )
    return result(
        f"nvflare {VERSION}",
        num_agents,
        model,
        measured,
        server=("server",),
        machine=machine,
        wire_bytes=measured.wire_bytes if is_own_network else None,
        notes=NOTES,
    )


def _lend_torch(bin_dir: Path) -> None:
    """Let NVFlare's environment import packages that it lacks, such as PyTorch, from this environment."""
    packages = bin_dir.parent / f"lib/python{sysconfig.get_python_version()}/site-packages"
    (packages / "ecavg-torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n", "utf-8")


def _provision(bin_dir: Path, folder: Path, num_agents: int, env: dict[str, str]) -> Path:
    """Make the keys and start-up kits, and return the folder that holds one folder for each site."""
    workspace = folder / "poc"
    subprocess.run(
        [bin_dir / "nvflare", "poc", "prepare", "-n", str(num_agents), "--force"],
        env={**env, "NVFLARE_POC_WORKSPACE": str(workspace)},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=PROVISION_SECONDS,
    )
    return workspace / "example_project/prod_00"


if __name__ == "__main__":
    sys.exit(main())
