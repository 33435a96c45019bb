"""The work on one job of the trainer, from job.json to result.json."""

import errno
import gc
from contextlib import suppress
from pathlib import Path

import structlog
import torch
import torch.distributed as dist

from ecavg.cloud_server.jobs import Job, JobDirectory, JobError, Result
from ecavg.cloud_server.trainer.averaging import Averaging, initialise
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.initial import initial_model
from ecavg.cloud_server.trainer.output import num_parameters, write_model
from ecavg.cloud_server.trainer.pipeline import RoundPipeline, Workplace
from ecavg.cloud_server.trainer.warm_up import WarmUp
from ecavg.common import tracing
from ecavg.common.checkpoint import CHECKPOINT_SECONDS
from ecavg.common.errors import ECAvgError, RunError, UsageError, is_out_of_memory
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import error_number, is_full
from ecavg.common.models import shared_part
from ecavg.common.rehearsal import rehearse
from ecavg.common.schema import read_header
from ecavg.common.wire import wire_of, wire_schema

log = structlog.get_logger()


def run_job(
    directory: JobDirectory,
    *,
    blobs_dir: Path,
    device_name: str,
    group: Group,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Do the job and write its result; an error is written as a result, too.

    Within a group every rank calls this function, and rank 0 writes the result. A rank that fails writes the
    error itself, unless it fails because another rank is gone, and raises it. The other ranks may then be
    waiting for the failed rank in the middle of a step: only a new group of ranks can do the next job.

    Args:
        directory: the directory of the job.
        blobs_dir: the directory of the blobs.
        device_name: the device to train on if the job leaves the choice to the trainer.
        group: this process's place among the ranks.
        checkpoint_seconds: the least time between two checkpoints of the fine-tune.

    Raises:
        OSError: the result cannot be written.
        Exception: the error of the job, if this process cannot do another job after it.
    """
    with structlog.contextvars.bound_contextvars(job=directory.path.name, rank=group.rank):
        attempt = _attempt(directory)
        try:
            result = _do(directory, blobs_dir, device_name, group, checkpoint_seconds)
            if group.rank == 0:
                directory.write_result(result)
                crash_point(Point.TRAINER_RESULT_WRITTEN)
                directory.discard_checkpoint()
            log.info("job_done", seconds=result.seconds, score=result.score_published)
        except Exception as error:
            # Model and data are the user's, so that a job can raise any exception.
            log.exception("job_failed")
            if group.world_size > 1 and _has_lost_rank(error):
                # The job stays pending, for the group that the other ranks form anew.
                raise
            _write_error(directory, error, attempt)
            # After a CUDA error other than a lack of memory, this process cannot use the GPU any more.
            if group.world_size > 1 or isinstance(error, torch.AcceleratorError):
                raise
    # The server ends this process at any moment.
    tracing.flush(0)
    gc.collect()
    torch.cuda.empty_cache()


def _attempt(directory: JobDirectory) -> int | None:
    """Return which attempt at the job this is; None if the job cannot be read."""
    with suppress(RunError):
        return directory.read_job().attempt
    return None


def _write_error(directory: JobDirectory, error: Exception, attempt: int | None) -> None:
    """Write the error as the job's result, unless another rank has written one."""
    if is_full(error):
        # The room that the checkpoint takes may be all that the model needs.
        directory.discard_checkpoint()
    if directory.read_result() is None:
        described = _describe(error).model_copy(update={"attempt": attempt})
        directory.write_result(Result(error=described))


def _do(
    directory: JobDirectory, blobs_dir: Path, device_name: str, group: Group, checkpoint_seconds: float
) -> Result:
    """Do the job and return its result."""
    job = directory.read_job()
    device = group.device(device_name if job.device == "auto" else job.device)
    log.info("job_started", round=job.round, attempt=job.attempt, device=str(device))
    if group.local_rank == 0:
        # What a machine has made as rank 0 of an earlier group is not the work of this one.
        directory.discard_output()
    group.share("discarded")
    crash_point(Point.TRAINER_JOB_TAKEN)
    if job.kind == "initialise":
        return _initialise(job, directory, group)
    with tracing.remote_span("job", job.traceparent):
        at = Workplace(directory, blobs_dir, device, group, checkpoint_seconds)
        return _pipeline_of(job)(job, at).run()


def _pipeline_of(job: Job) -> type[RoundPipeline]:
    """Return the class that does the work on the job's round."""
    if job.kind == "warm_up":
        return WarmUp
    return Averaging if job.run.only_averages else RoundPipeline


def _initialise(job: Job, directory: JobDirectory, group: Group) -> Result:
    """Make and write the run's initial weights, on rank 0 only."""
    if group.rank != 0:
        return Result()
    if job.run.only_averages:
        with directory.scratch():
            return initialise(job, directory)
    probe = rehearse(job.run)
    model = initial_model(job.run)
    with directory.scratch():
        wire, shared = wire_of(job.run.wire, None), shared_part(model, job.run)
        written = write_model(model, directory, wire, None, shared)
    # A schema that cannot be encoded is refused here, because after agents have joined it would be too late.
    wire_schema(read_header(directory.weights_path).schema, job.run.wire)
    return Result(
        weights=written.weights,
        encoded=written.encoded,
        rest=written.rest,
        probe=probe,
        num_parameters=num_parameters(model),
    )


def _has_lost_rank(error: Exception) -> bool:
    """Return True if the error says that another rank is gone; Gloo gives no class of its own to that."""
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return is_of_gloo or isinstance(error, dist.DistError)


def _describe(error: Exception) -> JobError:
    """Return the description of an error, in one line, for the server; the log has the traceback."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return JobError(kind="usage", message=text)
    if is_out_of_memory(error):
        return JobError(kind="out_of_memory", message=f"training ran out of memory: {text}")
    if is_full(error) or error_number(error) == errno.EROFS:
        return JobError(kind="storage", message=f"the server's disk takes no data: {text}")
    if isinstance(error, ECAvgError):
        return JobError(kind="failed", message=text)
    return JobError(kind="failed", message=f"{type(error).__name__}: {text}; see trainer.log")
