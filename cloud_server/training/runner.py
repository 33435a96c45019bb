"""One job at a time, given to the trainer: again where that may help, and not for ever."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import structlog

from ecavg.cloud_server.disk.failures import STORAGE_RETRY_SECONDS, storage_errors, when_disk_allows
from ecavg.cloud_server.jobs import Job, JobDirectory, JobError, Progress, Result
from ecavg.common.config import RunConfig
from ecavg.common.faults import Point, crash_point
from ecavg.common.transfer import to_the_end

POLL_SECONDS = 0.05
# A trainer may die so often before it takes up a job, without that being an attempt at the job.
MAX_FALSE_STARTS = 2

OnProgress = Callable[[list[Progress]], Awaitable[None]]

log = structlog.get_logger()


class JobWithdrawnError(Exception):
    """The job is not wanted any more: it counts an agent that is forgotten."""


class Trainer(Protocol):
    """What the runner asks of the trainer process."""

    async def restart(self) -> None:
        """Have the process drop its work; when this returns, it has left or is another one."""

    @property
    def num_exits(self) -> int:
        """Return how often the process has died since the server started."""

    @property
    def is_running(self) -> bool:
        """Return True while there is a process."""


async def _ignore(lines: list[Progress]) -> None: ...


class JobRunner:
    """The part of a server that gives jobs to the trainer, one at a time.

    Args:
        max_attempts: how often a job is tried; a full disk or a wrong configuration is no attempt.
    """

    def __init__(self, jobs_dir: Path, trainer: Trainer, max_attempts: int) -> None:
        self._jobs_dir = jobs_dir
        self._trainer = trainer
        self._max_attempts = max_attempts
        # Held to write to a job's folder, and to remove one; the last of the server's three locks.
        self._lock = asyncio.Lock()
        self._current: Job | None = None
        self._is_withdrawn = False

    def directory(self, name: str) -> JobDirectory:
        """Return the directory of the job with this name."""
        return JobDirectory(self._jobs_dir / name)

    async def finish(self, job: Job, on_progress: OnProgress = _ignore) -> Result:
        """Return the job's result: a model, or why there is none after the last attempt.

        A job that was begun before a restart goes on with its attempts where they were.

        Raises:
            JobWithdrawnError: the job has been withdrawn.
        """
        self._current, self._is_withdrawn = job, False
        try:
            return await self._finish(job, on_progress)
        finally:
            self._current = None

    @asynccontextmanager
    async def withdrawn_from(self, agent_id: str) -> AsyncIterator[None]:
        """Withdraw the job under way if it counts this agent; nobody writes to a job's folder meanwhile."""
        async with self._lock:
            if self._current and any(item.agent_id == agent_id for item in self._current.contributions):
                self._is_withdrawn = True
            yield

    async def drop_work(self) -> None:
        """Have the trainer drop what it is doing."""
        await self._trainer.restart()

    async def _finish(self, job: Job, on_progress: OnProgress) -> Result:
        directory = self.directory(job.name)
        begun = directory.read_job() if directory.is_begun else None
        if begun and begun.contributions == job.contributions:
            job = job.model_copy(update={"attempt": begun.attempt, "run": begun.run})
        else:
            # What is left of a job that was withdrawn would be taken for this one's.
            await self._write(directory.remove)
        result = directory.read_result()
        if result and not result.error:
            await on_progress(directory.read_progress(0)[0])
            return result
        if result and result.error and result.error.attempt not in (None, job.attempt):
            # A server that was killed as it began this attempt has left the result of the attempt before.
            result = None
        while True:
            if result is None:
                result = await self._attempt(directory, job, on_progress)
            if result.error is None or result.error.kind == "usage":
                return result
            log.warning("job_failed", job=job.name, attempt=job.attempt, reason=result.error.message)
            if result.error.kind == "storage":
                # A full disk is the disk's fault, not the job's, so it is no attempt.
                await asyncio.sleep(STORAGE_RETRY_SECONDS)
            elif job.attempt >= self._max_attempts:
                return result
            else:
                job = _next_attempt(job, result.error)
            result = None

    async def _attempt(self, directory: JobDirectory, job: Job, on_progress: OnProgress) -> Result:
        num_exits, offset, has_begun = 0, 0, False

        def begin() -> None:
            # Under the lock, so that nobody has the trainer restarted between these two lines.
            nonlocal num_exits
            num_exits = self._trainer.num_exits
            directory.write_job(job)

        await self._write(begin)
        crash_point(Point.SERVER_JOB_WRITTEN)
        while True:
            # The result is read first: no progress follows it.
            result = directory.read_result()
            lines, offset = directory.read_progress(offset)
            has_begun = has_begun or bool(lines)
            await on_progress(lines)
            if result:
                return result
            if self._is_withdrawn or not directory.is_begun:
                raise JobWithdrawnError
            if self._trainer.num_exits > num_exits + (0 if has_begun else MAX_FALSE_STARTS):
                died = JobError(
                    kind="failed", message="the trainer died; see trainer.log", attempt=job.attempt
                )
                # The result is on disk, so that the next trainer does not take the job up by itself.
                await self._write(directory.write_result, Result(error=died))
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def _write(self, write: Callable[..., object], *args: object) -> None:
        """Call `write` in a thread, once the disk allows it.

        Raises:
            JobWithdrawnError: the job has been withdrawn.
        """

        async def locked() -> None:
            async with self._lock:
                if self._is_withdrawn:
                    raise JobWithdrawnError
                with storage_errors():
                    await to_the_end(asyncio.to_thread(write, *args))

        await when_disk_allows(locked)


def _next_attempt(job: Job, error: JobError) -> Job:
    """Return the job's next attempt, with half the batch where memory ran out."""
    run = _with_half_the_batch(job.run) if error.kind == "out_of_memory" else job.run
    return job.model_copy(update={"attempt": job.attempt + 1, "run": run})


def _with_half_the_batch(run: RunConfig) -> RunConfig:
    batch_size = max(1, run.fine_tune.batch_size // 2)
    return run.model_copy(update={"fine_tune": run.fine_tune.model_copy(update={"batch_size": batch_size})})
