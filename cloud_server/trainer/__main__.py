"""The trainer's command, which does the jobs of a state directory one after the other, until it is stopped.

The server starts `python -m ecavg.cloud_server.trainer --state-dir DIR`. On a machine with several GPUs, this
process starts one rank for each GPU through torchrun's launcher; otherwise it does the jobs itself. To train
on several machines, run `torchrun --nnodes=N … -m ecavg.cloud_server.trainer --state-dir DIR` on each,
with a state directory that all of them share, or one that cloud_server/training/relay.py fills on each.

The trainer cleans nothing up before it exits, because a job may be killed at any moment and started again.
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

from ecavg.cloud_server.jobs import JobDirectory, pending_jobs
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import cli, tracing
from ecavg.common.errors import RunError, UsageError
from ecavg.common.logs import configure_logging

POLL_SECONDS = 0.025
# A job that one machine has found is on all others after this time, with all its blobs.
ARRIVAL_SECONDS = 600.0
# The least time between two checkpoints of a fine-tune, each of which may be as large as three models.
TRAINER_CHECKPOINT_SECONDS = 30.0
# The launcher starts a failed group of ranks so many times again. Then the launcher exits as well, and the
# server starts a new trainer.
MAX_RESTARTS = 3

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer and return the exit code of the process."""
    return cli.enter("trainer", lambda: _start(argv))


def _start(argv: Sequence[str] | None) -> int:
    """Do jobs until the process is ended, alone or as the launcher of several ranks."""
    arguments = _parser().parse_args(argv)
    # The default action of a signal ends the process even inside a call of PyTorch. Python's handler would
    # only run after that call.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_server, daemon=True).start()
    configure_logging()
    tracing.start("ecavg-trainer")
    if "RANK" not in os.environ and (num_ranks := _num_gpus(arguments.device)) > 1:
        return _launch(num_ranks, arguments)
    try:
        _work(StateDir(arguments.state_dir), arguments.device, arguments.checkpoint_seconds)
    except Exception as error:
        if not isinstance(error, UsageError):
            # Nobody sees what this process does but in its log.
            log.exception("trainer_failed")
        raise


def _parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = cli.Parser(
        prog="python -m ecavg.cloud_server.trainer",
        description="Do the training of a cloud-server. The server starts this by itself;"
        " run it under torchrun to train on several machines.",
    )
    parser.add_argument(
        "--state-dir", type=Path, required=True, metavar="DIR", help="the server's state directory"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:1; auto and cuda take every GPU there is"
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=TRAINER_CHECKPOINT_SECONDS,
        metavar="SECONDS",
        help="the least time between two checkpoints of a fine-tune; default: %(default)s",
    )
    return parser


def _exit_with_server() -> None:
    """Wait for the end of stdin, and then exit from the process.

    The server holds the other end of stdin, so that stdin ends with the server. If stdin is neither a pipe
    nor a socket, as under a torchrun that was started by hand, then no server holds it, and the function
    returns.
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
    """Return the number of devices that `device` stands for: all GPUs of the machine, or one device."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 1


def _launch(num_ranks: int, arguments: argparse.Namespace) -> int:
    """Run one rank on each GPU, and return the exit code; if one rank fails, all ranks are started again."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ecavg.cloud_server.trainer.group import OWN_STORE

    os.environ[OWN_STORE] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
    )
    command = [
        "-m", "ecavg.cloud_server.trainer", "--state-dir", str(arguments.state_dir),
        "--device", arguments.device, "--checkpoint-seconds", str(arguments.checkpoint_seconds),
    ]  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*command)
    except SignalException:
        return 0
    except ChildFailedError:
        return 1
    return 0


def _work(state_dir: StateDir, device: str, checkpoint_seconds: float) -> NoReturn:
    """Do every job that becomes pending, as one rank of a group or alone."""
    # Importing PyTorch takes seconds, and an error in the command line should be reported without that delay.
    import torch

    from ecavg.cloud_server.trainer.group import Group
    from ecavg.cloud_server.trainer.work import run_job
    from ecavg.common.devices import make_deterministic

    make_deterministic()
    group = Group.join(device)
    # The first use of a GPU takes seconds, which are spent here instead of in the first job. If there is no
    # such device, the first job reports the error.
    with contextlib.suppress(UsageError):
        torch.zeros(1, device=group.device(device))
    # The objects that importing PyTorch has made are never freed. Without this call the garbage collection
    # after each job would look through all of them, which takes 0.2 s.
    gc.freeze()
    log.info("trainer_ready", rank=group.rank, world_size=group.world_size)
    while True:
        name, _, job_id = group.share(_next_job(state_dir.jobs) if group.rank == 0 else "").partition(" ")
        directory = JobDirectory(state_dir.job(name))
        _await_job(directory, job_id)
        run_job(
            directory,
            blobs_dir=state_dir.blobs,
            device_name=device,
            group=group,
            checkpoint_seconds=checkpoint_seconds,
        )


def _next_job(jobs_dir: Path) -> str:
    """Wait until a job is pending, and return the name and the id of the first pending job.

    The id is missing if the job cannot be read, which is then said by whoever does it.
    """
    while not (pending := pending_jobs(jobs_dir)):
        time.sleep(POLL_SECONDS)
    return f"{pending[0].path.name} {_id_of(pending[0])}"


def _id_of(directory: JobDirectory) -> str:
    try:
        return directory.read_job().id
    except RunError:
        return ""


def _await_job(directory: JobDirectory, job_id: str) -> None:
    """Wait until the job that rank 0 has found is in this machine's folder as well.

    Raises:
        RunError: it does not come, because it was withdrawn or no relay runs here; the ranks begin anew.
    """
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while job_id and _id_of(directory) != job_id:
        if time.monotonic() > deadline:
            raise RunError(
                f"job {directory.path.name} of another machine did not come here: run a relay here"
            )
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
