"""The run in a state directory: opening it, beginning it, and adopting the models that jobs have made."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from ecavg.cloud_server import records
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.disk.tables import EncodingRow
from ecavg.cloud_server.jobs import JobDirectory, JobError, Result
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.training.runner import JobRunner
from ecavg.common import schema
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError, UsageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.transfer import to_the_end


@dataclass(frozen=True)
class Run:
    """The properties of a run that never change."""

    run_id: str
    config: RunConfig
    # The names, shapes and dtypes of the model's weights: every upload is checked against them.
    weights_schema: schema.Schema
    # Outputs of the model, by which agents know that they have the same one: see common/rehearsal.py.
    probe: tuple[float, ...]
    # How many rounds the learning-rate schedule is for; see common/schedule.py.
    planned_rounds: int
    # Seconds since the epoch.
    began_at: float

    @property
    def default_name(self) -> str:
        """Return a name for people: the model, the dataset, and the day (UTC) on which the run began."""
        day = datetime.fromtimestamp(self.began_at, UTC).date()
        return f"{self.config.model} on {self.config.dataset}, {day}"


async def open_run(config: ServerConfig, store: Store, jobs: JobRunner, clock: Callable[[], float]) -> Run:
    """Return the run in the state directory; begin a run if there is none.

    Raises:
        UsageError: the directory holds another run, or the run's model cannot be built.
        RunError: the trainer could not make the initial weights.
    """
    row = await asyncio.to_thread(store.run)
    if row is None:
        await _begin(config, store, jobs, clock)
        row = await asyncio.to_thread(store.run)
    elif difference := records.first_difference(row.config_json, config.run):
        raise UsageError(
            f"{config.state_dir} holds a run with another configuration ({difference});"
            " give that one, or another --state-dir"
        )
    assert row is not None
    first = await asyncio.to_thread(store.round, config.run.first_round)
    assert first is not None
    async with store.blobs.in_use([first.initial_digest]):
        header = schema.read_header(store.blobs.path(first.initial_digest))
    return Run(row.run_id, config.run, header.schema, row.probe, row.planned_rounds, row.created_at)


@asynccontextmanager
async def kept_model(store: Store, directory: JobDirectory, result: Result) -> AsyncIterator[None]:
    """Have what a job has made where blobs are kept, and there to stay until the context ends.

    Raises:
        StorageError: the disk or the bucket takes no data now.
    """
    async with AsyncExitStack() as stack:
        for path, file in directory.model_files(result).items():
            await stack.enter_async_context(store.blobs.kept(path, file.sha256))
        yield


def adopt_model(store: Store, directory: JobDirectory, result: Result) -> None:
    """Turn the weights that a job has made, with encoding and rest, into blobs; doing it twice is harmless.

    Raises:
        StorageError: the disk takes no data now.
    """
    assert result.weights
    store.blobs.adopt(directory.weights_path, result.weights.sha256)
    crash_point(Point.SERVER_MODEL_ADOPTED)
    if result.rest:
        store.blobs.adopt(directory.rest_path, result.rest.sha256)
        store.record_rest(result.weights.sha256, result.rest.sha256)
    if result.encoded:
        store.blobs.adopt(directory.encoded_path, result.encoded.sha256)
        encoding = EncodingRow(result.encoded.sha256, result.encoded.base)
        store.record_encoding(result.weights.sha256, encoding)
        crash_point(Point.SERVER_ENCODED_MODEL_ADOPTED)


async def _begin(config: ServerConfig, store: Store, jobs: JobRunner, clock: Callable[[], float]) -> None:
    """Let the trainer make the initial weights, then record the run and its first round.

    Raises:
        UsageError: the run's model cannot be built.
        RunError: the trainer could not make the initial weights.
    """
    job = records.initialise_job(config.run, config.device)
    directory = jobs.directory(job.name)
    # An earlier start that failed may have left this job's folder.
    directory.remove()
    result = await jobs.finish(job)
    if result.error or result.weights is None:
        error = result.error or JobError(kind="failed", message="the trainer gave no weights")
        raise (UsageError if error.kind == "usage" else RunError)(error.message)
    async with AsyncExitStack() as stack:
        await when_disk_allows(lambda: stack.enter_async_context(kept_model(store, directory, result)))
        await when_disk_allows(lambda: to_the_end(asyncio.to_thread(adopt_model, store, directory, result)))
    run_json = config.run.model_dump_json()
    await asyncio.to_thread(
        store.create_run,
        uuid.uuid4().hex,
        run_json,
        result.weights.sha256,
        clock(),
        result.probe,
        config.rounds or 1,
        config.run.first_round,
    )
    crash_point(Point.SERVER_RUN_CREATED)
