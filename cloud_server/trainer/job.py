"""One job, from job.json to result.json."""

import errno
import gc
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import structlog
import torch
from torch import nn

from cloud_server.jobs import Job, JobDirectory, JobError, Progress, Result, Weights, blob_path
from cloud_server.trainer.aggregation import coefficients, mean
from cloud_server.trainer.finetune import Examples, combine, fine_tune
from cloud_server.trainer.group import Group
from common.config import RunConfig
from common.errors import ECAvgError, RunError, UsageError
from common.faults import Point, crash_point
from common.models import build_model
from common.training import StepReport, derive_seed, evaluate
from common.weights import write_state_dict

log = structlog.get_logger()


def run_job(directory: JobDirectory, *, blobs_dir: Path, device_name: str, group: Group) -> None:
    """Do the job and write its result; that something went wrong is a result, too.

    Within a group every rank calls this, and rank 0 writes. But whichever rank fails writes why, and
    raises: the others may be waiting for it in the middle of a step, so that only a new group can go on.

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
        except Exception as error:  # model and data are the user's: anything can be raised
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
        return _RoundJob(job, directory, blobs_dir, device, group).run()
    return _initialise(job, directory, group)


def _initialise(job: Job, directory: JobDirectory, group: Group) -> Result:
    """Make the run's initial weights."""
    if group.rank != 0:
        return Result()
    model = build_model(job.run, seed=derive_seed(job.run.seed, "initial_weights"))
    return Result(
        weights=_write_weights(model, directory.weights_path), num_parameters=_num_parameters(model)
    )


class _RoundJob:
    """Makes a round's global model: aggregate → fine-tune → evaluate."""

    def __init__(
        self, job: Job, directory: JobDirectory, blobs_dir: Path, device: torch.device, group: Group
    ) -> None:
        self._job = job
        self._run: RunConfig = job.run
        self._contributions = sorted(job.contributions, key=lambda contribution: contribution.agent_id)
        self._directory = directory
        self._blobs_dir = blobs_dir
        self._device = device
        self._group = group
        self._is_first = group.rank == 0
        self._seconds: dict[str, float] = {}

    def run(self) -> Result:
        """The result; it means something on rank 0 only, which also writes the weights."""
        model = build_model(self._run, seed=self._run.seed)  # for its structure; the weights are replaced
        data = combine(self._run, self._contributions, self._blobs_dir)

        self._tell("aggregating", 0, 1)
        self._aggregate_into(model)
        accuracy_average = self._evaluate(model, data.held_out)
        self._tell("fine_tuning", 0, 1)
        self._fine_tune(model, data.train)
        crash_point(Point.TRAINER_FINE_TUNED)
        self._tell("evaluating", 0, 1)
        accuracy_fine_tuned = self._evaluate(model, data.held_out)
        self._tell("evaluating", 1, 1)

        return Result(
            weights=_write_weights(model, self._directory.weights_path) if self._is_first else None,
            candidates={} if accuracy_average is None else {"average": accuracy_average},
            start="average",
            accuracy_fine_tuned=accuracy_fine_tuned,
            accuracy_published=accuracy_fine_tuned,
            seconds=self._seconds,
            num_parameters=_num_parameters(model),
            finished_at=time.time(),
        )

    def _aggregate_into(self, model: nn.Module) -> None:
        """On rank 0 alone: the others get its weights when the fine-tune begins."""
        if not self._is_first:
            return
        with self._timed("aggregate"):
            state_dict = mean(
                [blob_path(self._blobs_dir, item.weights) for item in self._contributions],
                coefficients([item.num_examples for item in self._contributions], self._run.weights),
                on_tensor=self._tell_tensor,
            )
            model.load_state_dict(state_dict)

    def _evaluate(self, model: nn.Module, examples: Examples) -> float | None:
        """Its accuracy; None where there is nothing to measure it on."""
        if not self._is_first or not len(examples.labels):
            return None
        with self._timed("evaluate"):
            return evaluate(model, *examples, spec=self._run.spec, device=self._device).accuracy

    def _fine_tune(self, model: nn.Module, examples: Examples) -> None:
        if not len(examples.labels):
            return  # agents may contribute their weights alone
        with self._timed("fine_tune"):
            fine_tune(
                model,
                examples,
                self._run,
                round_number=self._job.round,
                device=self._device,
                on_step=self._tell_step if self._is_first else None,
                rank=self._group.rank,
                world_size=self._group.world_size,
            )

    def _tell_tensor(self, done: int, total: int) -> None:
        self._tell("aggregating", done, total)
        crash_point(Point.TRAINER_TENSOR_AVERAGED)

    def _tell_step(self, report: StepReport) -> None:
        self._tell("fine_tuning", report.step, report.num_steps, report.loss)
        crash_point(Point.TRAINER_STEP_DONE)

    def _tell(
        self,
        phase: Literal["aggregating", "fine_tuning", "evaluating"],
        done: int,
        total: int,
        loss: float | None = None,
    ) -> None:
        if self._is_first:
            self._directory.append_progress(Progress(phase=phase, done=done, total=total, loss=loss))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - started


def _write_weights(model: nn.Module, path: Path) -> Weights:
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"tensor {name} of the new model is not finite: lower run.fine_tune.learning_rate")
    write_state_dict(state_dict, path)
    crash_point(Point.TRAINER_WEIGHTS_WRITTEN)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(sha256=digest, bytes=path.stat().st_size)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _describe(error: Exception) -> JobError:
    """One line for whoever waits for the model; the log has the rest."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return JobError(kind="usage", message=text)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return JobError(kind="out_of_memory", message=f"training ran out of memory: {text}")
    if _is_full_disk(error):
        return JobError(kind="storage", message=f"the server's disk takes no data: {text}")
    if isinstance(error, ECAvgError):
        return JobError(kind="failed", message=text)
    return JobError(kind="failed", message=f"{type(error).__name__}: {text}; see trainer.log")


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return f"os error {errno.ENOSPC})" in str(error)  # how safetensors says it
