"""Ranks that are processes of their own, for what needs a process group of PyTorch."""

import subprocess
import sys

from tests.processes import ROOT


def run_ranks(code: str, *arguments: object, world_size: int = 2) -> None:
    """Run the Python code as so many ranks, and check that all of them end well.

    Args:
        code: gets the rank, then `arguments`, as its command line.
    """
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *map(str, arguments)], cwd=ROOT)
        for rank in range(world_size)
    ]
    assert [process.wait(100) for process in ranks] == [0] * world_size
