"""The trainer: does the jobs of a state directory, one after the other, until it is stopped.

The server starts `python -m cloud_server.trainer --state-dir DIR`. With several GPUs that starts one
rank for each, through torchrun's launcher; otherwise it works in this very process. Where one machine
is not enough, run `torchrun --nnodes=N … -m cloud_server.trainer --state-dir DIR` on each of them,
over a shared state directory.

A job may be killed at any moment and done again: there is nothing to clean up before leaving.
"""

import argparse
import contextlib
import gc
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog

from cloud_server.jobs import JobDirectory, pending_jobs
from cloud_server.state_dir import StateDir
from common.errors import UsageError
from common.telemetry import configure_logging

POLL_SECONDS = 0.025
MAX_RESTARTS = 3  # of a group of ranks; then the launcher leaves as well, and the server starts it anew

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # By default signals end the process even while it waits inside PyTorch; Python's handler could not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_leave_with_server, daemon=True).start()
    configure_logging()
    try:
        if "RANK" not in os.environ and (num_ranks := _num_gpus(arguments.device)) > 1:
            return _launch(num_ranks, arguments)
        _work(StateDir(arguments.state_dir), arguments.device)
    except UsageError as error:
        print(f"trainer: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cloud_server.trainer",
        description="Do the training of a cloud-server. The server starts this by itself;"
        " run it under torchrun to train on several machines.",
    )
    parser.add_argument(
        "--state-dir", type=Path, required=True, metavar="DIR", help="the server's state directory"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:1; auto and cuda take every GPU there is"
    )
    return parser


def _leave_with_server() -> None:
    """Wait for the end of stdin, whose other end the server holds, and end this process there.

    A terminal or /dev/null, as under a torchrun started by hand, is held by nobody.
    """
    stdin = sys.__stdin__
    if stdin is None:
        return
    mode = os.fstat(stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        while os.read(stdin.fileno(), 4096):
            pass
        os._exit(0)


def _num_gpus(device: str) -> int:
    """How many GPUs `device` stands for."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 1


def _launch(num_ranks: int, arguments: argparse.Namespace) -> int:
    """Run one rank on each GPU, all of them again when one of them fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
    )
    command = ["-m", "cloud_server.trainer", "--state-dir", str(arguments.state_dir)]
    try:
        elastic_launch(config, sys.executable)(*command, "--device", arguments.device)
    except SignalException:
        return 0
    except ChildFailedError:
        return 1
    return 0


def _work(state_dir: StateDir, device: str) -> NoReturn:
    """Do every job that turns up, as one rank of a group or alone."""
    # Importing PyTorch takes seconds: after the command line is known to be right.
    import torch

    from cloud_server.trainer.group import Group
    from cloud_server.trainer.work import run_job
    from common.training import make_deterministic

    make_deterministic()
    group = Group.join(device)
    with contextlib.suppress(UsageError):  # the first job will say that there is no such device
        torch.zeros(1, device=group.device(device))  # the first use of a GPU takes seconds, too
    gc.freeze()  # what PyTorch's import has made stays; looking through it after each job takes 0.2 s
    log.info("trainer_ready", rank=group.rank, world_size=group.world_size)
    while True:
        name = group.share(_next_job(state_dir.jobs) if group.rank == 0 else "")
        directory = JobDirectory(state_dir.job(name))
        run_job(directory, blobs_dir=state_dir.blobs, device_name=device, group=group)


def _next_job(jobs_dir: Path) -> str:
    """The name of the first pending job, as soon as there is one."""
    while not (pending := pending_jobs(jobs_dir)):
        time.sleep(POLL_SECONDS)
    return pending[0].path.name


if __name__ == "__main__":
    sys.exit(main())
