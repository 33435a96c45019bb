"""One job of the trainer, from job.json to result.json."""

import errno
import gc
from pathlib import Path

import structlog
import torch

from cloud_server.jobs import Job, JobDirectory, JobError, Result
from cloud_server.trainer.group import Group
from cloud_server.trainer.initial import initial_model
from cloud_server.trainer.output import num_parameters, write_model
from cloud_server.trainer.pipeline import RoundPipeline
from common.errors import ECAvgError, UsageError
from common.faults import Point, crash_point
from common.files import error_number, is_full
from common.schema import read_header
from common.wire import wire_of, wire_schema

log = structlog.get_logger()


def run_job(directory: JobDirectory, *, blobs_dir: Path, device_name: str, group: Group) -> None:
    """Do the job and write its result; an error is a result, too.

    Within a group every rank calls this, and rank 0 writes. But whichever rank fails writes why, and
    raises: the other ranks may be waiting for it in the middle of a step, so that only a new group can go on.

    Args:
        device_name: where to train when the job leaves it open.

    Raises:
        OSError: the result cannot be written.
        Exception: what went wrong, when this process cannot do another job.
    """
    with structlog.contextvars.bound_contextvars(job=directory.path.name, rank=group.rank):
        try:
            result = _do(directory, blobs_dir, device_name, group)
            if group.rank == 0:
                directory.write_result(result)
                crash_point(Point.TRAINER_RESULT_WRITTEN)
            log.info("job_done", seconds=result.seconds, accuracy=result.accuracy_published)
        except Exception as error:
            # Model and data are the user's, so anything can be raised.
            log.exception("job_failed")
            if directory.read_result() is None:
                directory.write_result(Result(error=_describe(error)))
            # After a CUDA error (other than out of memory) nothing works on that GPU any more.
            if group.world_size > 1 or isinstance(error, torch.AcceleratorError):
                raise
    gc.collect()
    torch.cuda.empty_cache()


def _do(directory: JobDirectory, blobs_dir: Path, device_name: str, group: Group) -> Result:
    job = directory.read_job()
    device = group.device(device_name if job.device == "auto" else job.device)
    log.info("job_started", round=job.round, attempt=job.attempt, device=str(device))
    if group.rank == 0:
        directory.discard_output()
    crash_point(Point.TRAINER_JOB_TAKEN)
    if job.kind == "round":
        return RoundPipeline(job, directory, blobs_dir, device, group).run()
    return _initialise(job, directory, group)


def _initialise(job: Job, directory: JobDirectory, group: Group) -> Result:
    """Write the run's initial weights."""
    if group.rank != 0:
        return Result()
    model = initial_model(job.run)
    with directory.scratch():
        written = write_model(model, directory, wire_of(job.run.wire, None), None)
    # A schema that cannot be encoded is refused now: once agents have joined it would be too late.
    wire_schema(read_header(directory.weights_path).schema, job.run.wire)
    return Result(weights=written.weights, encoded=written.encoded, num_parameters=num_parameters(model))


def _describe(error: Exception) -> JobError:
    """Return the error in one line, for whoever waits for the model; the log has the rest."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return JobError(kind="usage", message=text)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return JobError(kind="out_of_memory", message=f"training ran out of memory: {text}")
    if is_full(error) or error_number(error) == errno.EROFS:
        return JobError(kind="storage", message=f"the server's disk takes no data: {text}")
    if isinstance(error, ECAvgError):
        return JobError(kind="failed", message=text)
    return JobError(kind="failed", message=f"{type(error).__name__}: {text}; see trainer.log")
