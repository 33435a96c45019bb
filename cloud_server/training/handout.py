"""The server's end of external trainers: jobs go out through the bucket, and results come back through it.

    PREFIX/jobs/round-0003/<id of the job>/
        job.json             put there by the server, which deletes all when it has the result or withdraws
        progress.jsonl       put there by the relay of the machine of rank 0, as all that follow
        checkpoint           the last finished epoch of the fine-tune, for machines that come to it later
        model.safetensors, encoded.safetensors, rest.safetensors
        result.json          put there last

A result of another attempt, or of a job that was withdrawn, has another id and is never read.
"""

import asyncio
import contextlib
from collections.abc import Collection
from pathlib import Path

import structlog

from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.jobs import Job, JobDirectory, Result, pending_jobs
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.errors import RunError, StorageError
from ecavg.common.files import replacing
from ecavg.common.transfer import Blob

STEP_SECONDS = 0.5
JOBS = "jobs"

log = structlog.get_logger()


def key_of(job: Job) -> str:
    """Return below which name a job's objects are."""
    return f"{JOBS}/{job.name}/{job.id}"


def take_back(state_dir: StateDir, bucket: Bucket) -> None:
    """Delete what the bucket has of jobs that are not pending; the machines drop them within seconds.

    Raises:
        StorageError: the bucket does not let it.
        RunError: a pending job is damaged.
    """
    _taken_back(bucket, _pending(state_dir.jobs))


class HandOut:
    """The jobs of one server on their way to other machines; one thread at a time may call this."""

    def __init__(self, state_dir: StateDir, bucket: Bucket) -> None:
        self._jobs_dir = state_dir.jobs
        self._bucket = bucket
        # What an earlier server has left is looked for as well.
        self._is_clear = False

    def step(self) -> None:
        """Bring the bucket's jobs up to date, and the results and the progress of jobs here.

        Raises:
            StorageError: the bucket or the disk does not let it; a later step goes on.
            RunError: a job or a result is damaged.
        """
        pending = _pending(self._jobs_dir)
        if self._is_clear and not pending:
            return
        there = _taken_back(self._bucket, pending)
        for key, directory in pending.items():
            with storage_errors():
                self._exchange(key, directory, there)
        self._is_clear = not pending

    def _exchange(self, key: str, directory: JobDirectory, there: dict[str, int]) -> None:
        if f"{key}/job.json" not in there:
            self._bucket.put_file(directory.job_path, f"{key}/job.json")
            return
        progress = f"{key}/progress.jsonl"
        if there.get(progress, 0) not in (0, _size(directory.progress_path)):
            with replacing(directory.progress_path) as partial:
                partial.write_bytes(self._bucket.read(progress))
        if f"{key}/result.json" in there:
            self._fetch_result(key, directory)

    def _fetch_result(self, key: str, directory: JobDirectory) -> None:
        result = Result.model_validate_json(self._bucket.read(f"{key}/result.json"))
        for path, made in directory.model_files(result).items():
            self._bucket.fetch_file(f"{key}/{path.name}", Blob(made.sha256, made.bytes), path)
        # It ends the job, whose objects go at the next step.
        directory.write_result(result)


class ExternalTrainers:
    """Trainers that somebody else starts, with the methods of a `TrainerProcess`.

    Args:
        bucket: where jobs are handed out; None: the trainers share the state directory.
    """

    # Of the death of a trainer nothing is heard: its group begins the job anew.
    num_exits = 0
    is_running = True

    def __init__(self, state_dir: Path, bucket: Bucket | None) -> None:
        self._hand_out = HandOut(StateDir(state_dir), bucket) if bucket else None
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Hand out jobs from now on."""
        self._task = asyncio.create_task(self._keep_handing_out())

    async def stop(self) -> None:
        """Hand out no more jobs, and take back what is over; a second call does nothing."""
        if self._task:
            task, self._task = self._task, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._try_step()

    async def restart(self) -> None:
        """Take back the jobs that are not pending any more; the machines drop them within seconds.

        Raises:
            StorageError: the bucket does not let it.
        """
        await self._step()

    async def _keep_handing_out(self) -> None:
        while True:
            await self._try_step()
            await asyncio.sleep(STEP_SECONDS)

    async def _try_step(self) -> None:
        try:
            await self._step()
        except (StorageError, RunError, OSError, ValueError) as error:
            log.warning("jobs_not_handed_out", reason=str(error))

    async def _step(self) -> None:
        if self._hand_out:
            async with self._lock:
                await asyncio.to_thread(self._hand_out.step)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _pending(jobs_dir: Path) -> dict[str, JobDirectory]:
    return {key_of(each.read_job()): each for each in pending_jobs(jobs_dir)}


def _taken_back(bucket: Bucket, pending: Collection[str]) -> dict[str, int]:
    """Delete the objects of all other jobs, and return the sizes of those that were there, by name."""
    there = bucket.names(JOBS)
    if stale := [name for name in there if name.rpartition("/")[0] not in pending]:
        bucket.delete_files(stale)
    return there
