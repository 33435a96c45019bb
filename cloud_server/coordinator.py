"""The order of things: the only file that knows how a round goes from open to published.

One task runs `run()`; requests from agents change the round under one lock and wake it. Whatever a
restart must not lose is in the store before anyone is told.
"""

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from cloud_server import reports, retention
from cloud_server.config import ServerConfig
from cloud_server.jobs import Job, JobContribution, JobDirectory, JobError, Progress, Result
from cloud_server.metrics import ServerMetrics
from cloud_server.round import Contribution, Outcome, Phase, Policy, Rejection, Round
from cloud_server.store import ContributionRow, ReportRow, RoundRow, Store, storage_errors
from cloud_server.uploads import Upload, Uploads
from common import schema
from common.config import RunConfig
from common.errors import InvalidError, NotFoundError, Reason, RunError, StorageError, UsageError
from common.faults import Point, crash_point
from common.transfer import Blob

POLL_SECONDS = 0.05
STORAGE_RETRY_SECONDS = 2.0  # between two tries to write to a disk that is full or read-only
STATUS_ROUNDS = 50  # as many of the latest rounds are on the status page
MAX_FALSE_STARTS = 2  # a trainer may die so often before it takes up a job, without that being a try
LIVENESS_SECONDS = 30.0  # an agent that was here so recently is expected back: it is being restarted
LIVENESS_POLL_SECONDS = 1.0

# What makes a blob unfit for good; anything else about an upload can be cured by sending it again.
_UNFIT = {
    Reason.INVALID_FILE,
    Reason.SCHEMA_MISMATCH,
    Reason.NON_FINITE,
    Reason.INVALID_SHARD,
    Reason.SIZE_LIMIT,
}

_WORK = (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING)  # the trainer's phases, in order
_PHASE_OF_PROGRESS = {
    "aggregating": Phase.AGGREGATING,
    "fine_tuning": Phase.FINE_TUNING,
    "evaluating": Phase.EVALUATING,
}

_T = TypeVar("_T")

log = structlog.get_logger()


class Trainer(Protocol):
    """What the coordinator needs to know of the trainer process."""

    @property
    def num_exits(self) -> int:
        """How often it has died since the server started."""


@dataclass(frozen=True)
class Membership:
    """What an agent learns when it joins."""

    run_id: str
    run: RunConfig
    slot: int
    num_partitions: int
    initial_weights: Blob


@dataclass(frozen=True)
class PublishedModel:
    round: int
    weights: Blob


@dataclass(frozen=True)
class RunState:
    """The whole state of the run at one moment, as one agent may see it."""

    round: int
    phase: Phase
    initial_weights: Blob
    outcome: Outcome | None
    progress: Progress | None
    latest_model: PublishedModel | None
    failed_round: int  # the last round that failed; 0: none has
    failure: str  # why it did
    run_over: bool
    num_contributions: int
    max_contributions: int


@dataclass(frozen=True)
class Verdict:
    """How a contribution ended, and why."""

    outcome: Outcome
    reason: Reason | None = None
    message: str = ""


class Coordinator:
    """Owns the run: its round, its agents, its jobs.

    Args:
        clock: seconds since the epoch; deadlines outlive the process.
        on_change: called after every change, for a progress display.
    """

    def __init__(
        self,
        config: ServerConfig,
        store: Store,
        trainer: Trainer,
        metrics: ServerMetrics,
        *,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[RunState], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._store = store
        self._trainer = trainer
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._jobs_dir = config.state_dir / "jobs"
        self._policy = Policy(
            min_agents=config.min_agents,
            max_agents=config.agents_to_close,
            deadline_seconds=config.deadline_seconds,
            on_too_few=config.on_too_few,
        )
        self._lock = asyncio.Lock()
        self._report_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._slots: dict[str, int] = {}
        self._watching: Counter[str] = Counter()
        self._last_seen: dict[str, float] = {}  # monotonic seconds
        self._dismissed: set[str] = set()  # told that the run is over
        self._progress: Progress | None = None
        self._run_over = False
        self._round: Round  # set by start()
        self._uploads: Uploads
        self._run_id = ""
        self._latest_model: PublishedModel | None = None
        self._last_failure = (0, "")  # round, reason

    # ------------------------------------------------------------------ the life of a run

    async def start(self) -> None:
        """Find the run in the state directory, or begin it.

        Raises:
            UsageError: the directory holds another run, or the run's model cannot be built.
        """
        run = await asyncio.to_thread(self._store.run)
        if run is None:
            await self._begin_run()
        elif difference := _first_difference(run.config_json, self._config.run):
            raise UsageError(
                f"{self._config.state_dir} holds a run with another configuration ({difference});"
                " give that one, or another --state-dir"
            )
        await self._restore()
        await self._clean_up()

    async def run(self) -> bool:
        """Run every round that is left; True when the last one was published."""
        while not self._run_over:
            if not self._round.is_over:
                await self._collect()
            if not self._round.is_over:
                await self._train()
            await self._end_round()
        await self._say_farewell()
        return self._round.phase is Phase.PUBLISHED

    async def _begin_run(self) -> None:
        """Have the trainer build the model: its weights are the start, its names and shapes the gate."""
        JobDirectory(self._jobs_dir / "initialise").remove()  # of a start that failed
        job = Job(
            kind="initialise",
            name="initialise",
            round=0,
            run=self._config.run,
            device=self._config.device,
            initial_weights=None,
        )
        result = await self._finish_job(job)
        if result.error or result.weights is None:
            error = result.error or JobError(kind="failed", message="the trainer gave no weights")
            raise (UsageError if error.kind == "usage" else RunError)(error.message)
        await self._adopt(job, result)
        await asyncio.to_thread(
            self._store.create_run,
            uuid.uuid4().hex,
            self._config.run.model_dump_json(),
            result.weights.sha256,
            self._clock(),
        )
        crash_point(Point.SERVER_RUN_CREATED)

    async def _restore(self) -> None:
        run, row = self._store.run(), self._store.last_round()
        assert run is not None
        assert row is not None
        self._run_id = run.run_id
        self._slots = {agent.agent_id: agent.slot for agent in self._store.agents()}
        rows = self._store.rounds()
        published = [row for row in rows if row.published]
        if published:
            self._latest_model = self._model_of(published[-1])
        self._last_failure = max(((row.number, row.failure) for row in rows if row.failure), default=(0, ""))
        self._initial_weights = self._blob(rows[0].initial_weights)
        self._uploads = Uploads(
            self._store,
            weights_schema=schema.read_header(self._store.blob_path(rows[0].initial_weights)).schema,
            spec=self._config.run.spec,
            max_data_bytes=self._config.max_upload_bytes,
        )
        self._round = _round_from(row, self._store.contributions(row.number), self._policy)
        self._last_seen = dict.fromkeys(self._round.contributions, time.monotonic())
        self._publish_change()

    async def _collect(self) -> None:
        """Wait until the round closes by number or by time."""
        while True:
            changed = self._changed
            await self._transition(lambda round_: round_.tick(self._clock()))
            if self._round.phase is not Phase.COLLECTING:
                return
            await _wait(changed, self._seconds_to_deadline())

    async def _train(self) -> None:
        """Average, fine-tune and evaluate in the trainer; publish what comes back."""
        job = self._job_of_round()
        result = await self._finish_job(job)
        if result.error or result.weights is None:
            reason = result.error.message if result.error else "the trainer gave no weights"
            await self._transition(lambda round_: round_.fail(reason))
            return
        digest = result.weights.sha256
        await self._adopt(job, result)
        await self._advance_to(Phase.EVALUATING)
        await self._transition(lambda round_: round_.publish(digest))
        for stage, accuracy in reports.stages(result).items():
            self._metrics.set_accuracy(stage, accuracy)

    async def _end_round(self) -> None:
        """Write the report, then open the next round or end the run."""
        number = self._round.number
        await self._write_report(number)
        outcome = self._round.phase.value
        self._metrics.count_round(outcome)
        log.info("round_ended", round=number, outcome=outcome, reason=self._round.failure or None)
        await self._clean_up()
        if self._config.rounds and number >= self._config.rounds:
            await self._wait_for_reports(number)
            self._run_over = True
        else:
            await self._open_next_round()
        self._publish_change()

    async def _open_next_round(self) -> None:
        """From the last global model on, or from where the failed round started."""
        number, start = self._round.number + 1, self._round.published or self._round.initial_weights
        await self._durably(self._store.open_round, number, start, self._clock())
        crash_point(Point.SERVER_ROUND_OPENED)
        row = self._store.last_round()
        assert row is not None
        self._round = _round_from(row, [], self._policy)

    async def _clean_up(self) -> None:
        """Remove what old rounds have left; a disk that does not let it is no reason to stop."""
        async with self._lock:
            try:
                await asyncio.to_thread(
                    retention.clean_up,
                    self._store,
                    self._config.state_dir,
                    keep_rounds=self._config.keep_rounds,
                    keep_partial_seconds=self._config.keep_partial_seconds,
                    now=self._clock(),
                )
            except (OSError, StorageError) as error:
                log.warning("clean_up_failed", reason=str(error))

    async def _wait_for_reports(self, number: int) -> None:
        """Until every live agent has reported on the published model, or the deadline passes."""
        until = time.monotonic() + self._config.deadline_seconds
        while self._round.phase is Phase.PUBLISHED and time.monotonic() < until:
            changed = self._changed
            reported = {row.agent_id for row in await asyncio.to_thread(self._store.reports, number)}
            if self._live_agents() <= reported:
                return
            await _wait(changed, LIVENESS_POLL_SECONDS)

    async def _say_farewell(self) -> None:
        """Until every live agent has been told that the run is over."""
        until = time.monotonic() + LIVENESS_SECONDS
        while self._live_agents() - self._dismissed and time.monotonic() < until:
            await _wait(self._changed, LIVENESS_POLL_SECONDS)

    def _live_agents(self) -> set[str]:
        """Those that watch, and those that may be back in a moment."""
        recently = time.monotonic() - LIVENESS_SECONDS
        return set(+self._watching) | {agent for agent, at in self._last_seen.items() if at > recently}

    # ------------------------------------------------------------------ what agents ask for

    async def join(self, agent_id: str) -> Membership:
        if agent_id not in self._slots:
            slot = await asyncio.to_thread(self._store.join, agent_id, self._clock())
            crash_point(Point.SERVER_AGENT_JOINED)
            self._slots[agent_id] = slot
            log.info("agent_joined", agent_id=agent_id, slot=slot)
            self._publish_change()
        return Membership(
            run_id=self._run_id,
            run=self._config.run,
            slot=self._slots[agent_id],
            num_partitions=self._config.run.num_partitions or self._policy.max_agents,
            initial_weights=self._initial_weights,
        )

    async def watch(self, agent_id: str) -> AsyncIterator[RunState]:
        """The state now, then again after each change; slow readers skip states, never the latest."""
        self._check_joined(agent_id)
        with self._counted_as_watching(agent_id):
            while True:
                changed = self._changed
                state = self.state_for(agent_id)
                yield state
                if state.run_over:
                    self._dismissed.add(agent_id)
                    return
                await changed.wait()

    async def query_upload(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        self._check_joined(agent_id)
        return await self._uploads.query(agent_id, kind, digest)

    @asynccontextmanager
    async def receive(self, agent_id: str, kind: str, blob: Blob, offset: int) -> AsyncIterator[Upload]:
        """Take in a blob; one that is unfit counts as this agent's rejected contribution."""
        self._check_joined(agent_id)
        try:
            async with self._uploads.open(agent_id, kind, blob, offset, self._clock()) as upload:
                yield upload
        except InvalidError as error:
            if error.reason in _UNFIT:
                await self._reject(agent_id, error.reason, str(error))
            raise
        self._metrics.count_received(kind, blob.size_bytes - offset)

    async def contribute(self, agent_id: str, number: int, contribution: Contribution) -> Verdict:
        """Commit uploaded blobs to round `number`; durable when this returns.

        Raises:
            ConflictError: another contribution of this agent stands.
            NotFoundError: a blob it names has not been uploaded by this agent.
        """
        self._check_joined(agent_id)
        async with self._lock:
            if number > self._round.number:
                raise InvalidError(f"round {number} is not open; round {self._round.number} is")
            if number < self._round.number:
                return await self._verdict_of_past_round(number, contribution)
            await self._check_uploaded(agent_id, contribution)  # no clean-up comes before the record
            updated, outcome = self._round.contribute(contribution)
            if updated is not self._round:
                row = _row_of(contribution, outcome, self._clock())
                await asyncio.to_thread(self._store.record_contribution, number, row)
                crash_point(Point.SERVER_CONTRIBUTION_RECORDED)
                self._round = updated
                self._metrics.count_contribution(outcome.value)
                log.info("contribution", round=number, agent_id=agent_id, outcome=outcome.value)
        self._publish_change()
        return _verdict(outcome, number)

    async def report(self, agent_id: str, number: int, row: ReportRow) -> None:
        """Keep what became of a published model on a device.

        Raises:
            NotFoundError: that round has published nothing.
        """
        self._check_joined(agent_id)
        round_row = await asyncio.to_thread(self._store.round, number)
        if round_row is None or round_row.published is None:
            raise NotFoundError(f"round {number} has published no model", Reason.MALFORMED_REQUEST)
        await asyncio.to_thread(self._store.record_report, number, replace(row, at=self._clock()))
        crash_point(Point.SERVER_AGENT_REPORT_RECORDED)
        await self._write_report(number)
        log.info("agent_reported", round=number, agent_id=agent_id, applied=row.applied)
        self._publish_change()

    def readable_blob(self, agent_id: str, digest: str) -> Path:
        """Where an agent's download is read from.

        Raises:
            NotFoundError: the digest is neither initial weights nor a published model.
        """
        self._check_joined(agent_id)
        if self._store.is_public(digest):
            return self._store.blob_path(digest)
        raise NotFoundError(f"no initial weights or published model has the digest {digest[:16]}…")

    def count_sent(self, num_bytes: int) -> None:
        self._metrics.count_sent("model", num_bytes)

    # ------------------------------------------------------------------ how it stands

    def state_for(self, agent_id: str | None = None) -> RunState:
        return RunState(
            round=self._round.number,
            phase=self._round.phase,
            initial_weights=self._blob(self._round.initial_weights),
            outcome=self._round.outcome_of(agent_id) if agent_id else None,
            progress=self._progress,
            latest_model=self._latest_model,
            failed_round=self._last_failure[0],
            failure=self._last_failure[1],
            run_over=self._run_over,
            num_contributions=len(self._round.contributions),
            max_contributions=self._policy.max_agents,
        )

    def status(self) -> Mapping[str, Any]:
        """What the status page shows; see common/telemetry.py for where."""
        rows = self._store.rounds(last=STATUS_ROUNDS)
        results = {row.number: self._result_of(row.number) for row in rows}
        last_published = max((row.number for row in rows if row.published), default=None)
        return reports.status(
            run_id=self._run_id,
            current=self._round,
            rows=rows,
            num_accepted=self._store.num_accepted(),
            results={number: result for number, result in results.items() if result},
            slots=self._slots,
            watching=set(+self._watching),
            agent_reports=self._store.reports(last_published) if last_published else [],
            progress=self._progress,
            run_over=self._run_over,
            now=self._clock(),
        )

    # ------------------------------------------------------------------ jobs

    def _job_of_round(self) -> Job:
        return Job(
            kind="round",
            name=f"round-{self._round.number:04d}",
            round=self._round.number,
            run=self._config.run,
            device=self._config.device,
            initial_weights=self._round.initial_weights,
            contributions=tuple(
                JobContribution(
                    agent_id=agent_id,
                    weights=contribution.weights,
                    shards=contribution.shards,
                    num_examples=contribution.num_examples,
                )
                for agent_id, contribution in sorted(self._round.contributions.items())
            ),
        )

    async def _finish_job(self, job: Job) -> Result:
        """Run a job, again where that may help: a dead trainer, or a batch that was too large."""
        directory = JobDirectory(self._jobs_dir / job.name)
        result = directory.read_result()
        if result and not result.error:  # finished before a restart
            await self._show_progress(job, directory.read_progress(0)[0])
            return result
        attempt = 1
        while True:
            result = await self._attempt(directory, job.model_copy(update={"attempt": attempt}))
            if result.error is None or result.error.kind == "usage":
                return result
            log.warning("job_failed", job=job.name, attempt=attempt, reason=result.error.message)
            if result.error.kind == "storage":  # the disk's fault, not the job's: it is no try
                await asyncio.sleep(STORAGE_RETRY_SECONDS)
                continue
            if attempt >= self._config.max_attempts:
                return result
            attempt += 1
            if result.error.kind == "out_of_memory":
                job = job.model_copy(update={"run": _with_half_the_batch(job.run)})

    async def _attempt(self, directory: JobDirectory, job: Job) -> Result:
        num_exits, offset, has_begun = self._trainer.num_exits, 0, False
        await self._durably(directory.write_job, job)
        crash_point(Point.SERVER_JOB_WRITTEN)
        while True:
            result = directory.read_result()  # first: after it comes no more progress
            lines, offset = directory.read_progress(offset)
            has_begun = has_begun or bool(lines)
            await self._show_progress(job, lines)
            if result:
                return result
            if self._trainer.num_exits > num_exits + (0 if has_begun else MAX_FALSE_STARTS):
                died = JobError(kind="failed", message="the trainer died; see trainer.log")
                # Written down, so that the next trainer does not take the job up by itself.
                await self._durably(directory.write_result, Result(error=died))
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def _show_progress(self, job: Job, lines: list[Progress]) -> None:
        if job.kind != "round":
            return
        for line in lines:
            await self._advance_to(_PHASE_OF_PROGRESS[line.phase], line)
        if lines:
            self._progress = lines[-1]
            self._publish_change()

    async def _advance_to(self, phase: Phase, progress: Progress | None = None) -> None:
        """Enter a phase of the trainer's work, through those between; a job run again starts over."""
        self._progress = progress
        here, there = _WORK.index(self._round.phase), _WORK.index(phase)
        again = [phase] if phase is Phase.AGGREGATING and here > there else []
        for each in again or _WORK[here + 1 : there + 1]:
            await self._transition(lambda round_, each=each: round_.advance(each))  # type: ignore[misc]

    async def _adopt(self, job: Job, result: Result) -> None:
        assert result.weights
        path = JobDirectory(self._jobs_dir / job.name).weights_path
        await self._durably(self._store.adopt_blob, path, result.weights.sha256)
        crash_point(Point.SERVER_MODEL_ADOPTED)

    def _result_of(self, number: int) -> Result | None:
        job = JobDirectory(self._jobs_dir / f"round-{number:04d}")
        return job.read_result() or reports.read_result(self._report_folder(number))

    def _report_folder(self, number: int) -> Path:
        return self._config.state_dir / "rounds" / f"{number:04d}"

    # ------------------------------------------------------------------ small parts

    async def _transition(self, change: Callable[[Round], Round]) -> None:
        """Make a change of phase durable, then true, then known."""

        async def record() -> bool:
            async with self._lock:
                updated = change(self._round)
                if updated is not self._round:
                    await asyncio.to_thread(self._record_phase, updated)
                    crash_point(Point.SERVER_PHASE_RECORDED)
                    self._round = updated
                    return True
                return False

        if not await self._when_disk_allows(record):
            return
        self._note_outcome()
        log.info("phase", round=self._round.number, phase=self._round.phase.value)
        self._publish_change()

    def _record_phase(self, updated: Round) -> None:
        self._store.set_phase(
            updated.number,
            updated.phase.value,
            self._clock(),
            failure=updated.failure,
            published=updated.published,
        )

    def _note_outcome(self) -> None:
        number = self._round.number
        if self._round.published:
            self._latest_model = PublishedModel(number, self._blob(self._round.published))
        if self._round.failure:
            self._last_failure = (number, self._round.failure)
        if self._round.is_over:
            self._progress = None

    async def _durably(self, write: Callable[..., None], *args: Any) -> None:
        """Write what the run cannot go on without."""

        async def body() -> None:
            with storage_errors():
                await asyncio.to_thread(write, *args)

        await self._when_disk_allows(body)

    async def _when_disk_allows(self, body: Callable[[], Awaitable[_T]]) -> _T:
        """Do it, and while the disk takes nothing, wait and try again: agents are answered meanwhile."""
        while True:
            try:
                return await body()
            except StorageError as error:
                log.error("disk_refuses", reason=str(error))
                await asyncio.sleep(STORAGE_RETRY_SECONDS)

    async def _reject(self, agent_id: str, reason: Reason, message: str) -> None:
        async with self._lock:
            updated = self._round.reject(agent_id, reason, message)
            if updated is self._round:
                return
            row = ContributionRow(
                agent_id=agent_id,
                outcome=Outcome.REJECTED.value,
                weights="",
                shards=(),
                num_examples=0,
                accuracy_local=None,
                reason=reason.value,
                message=message,
                at=self._clock(),
            )
            await asyncio.to_thread(self._store.record_contribution, self._round.number, row)
            self._round = updated
            self._metrics.count_contribution(Outcome.REJECTED.value)
            log.warning("contribution_rejected", round=updated.number, agent_id=agent_id, reason=reason.value)
        self._publish_change()

    async def _check_uploaded(self, agent_id: str, contribution: Contribution) -> None:
        blobs = [(contribution.weights, "weights"), *((digest, "data") for digest in contribution.shards)]
        for digest, kind in blobs:
            if not await asyncio.to_thread(self._store.has_upload, agent_id, digest, kind):
                raise NotFoundError(f"the {kind} blob {digest[:16]}… is not uploaded", Reason.MISSING_BLOB)

    async def _verdict_of_past_round(self, number: int, contribution: Contribution) -> Verdict:
        rows = await asyncio.to_thread(self._store.contributions, number)
        for row in rows:
            same = (row.agent_id, row.weights) == (contribution.agent_id, contribution.weights)
            if same and row.outcome == Outcome.ACCEPTED:
                return Verdict(Outcome.ACCEPTED)
        return _verdict(Outcome.LATE, number)

    async def _write_report(self, number: int) -> None:
        async with self._report_lock:
            await self._durably(self._write_report_now, number)
        crash_point(Point.SERVER_REPORT_WRITTEN)

    def _write_report_now(self, number: int) -> None:
        row = self._store.round(number)
        assert row is not None
        if row.retired:
            return  # what its report was made from is gone
        result = self._result_of(number)
        weights = self._store.blob_path(row.published) if row.published else None
        report = reports.build(
            self._config.run,
            row,
            self._store.contributions(number),
            self._store.reports(number),
            self._store.agents(),
            result,
            weights_bytes=weights.stat().st_size if weights else None,
        )
        reports.write(report, self._report_folder(number), weights)

    def _check_joined(self, agent_id: str) -> None:
        if agent_id not in self._slots:
            raise NotFoundError(f"agent {agent_id} has not joined this run", Reason.UNKNOWN_AGENT)

    @contextmanager
    def _counted_as_watching(self, agent_id: str) -> Any:
        self._watching[agent_id] += 1
        self._publish_change()
        try:
            yield
        finally:
            self._watching[agent_id] -= 1
            self._last_seen[agent_id] = time.monotonic()
            self._publish_change()

    def _seconds_to_deadline(self) -> float | None:
        """None: nothing happens by time alone."""
        deadline = self._round.deadline_at
        if deadline is None or deadline <= self._clock():
            return None
        return deadline - self._clock()

    def _blob(self, digest: str) -> Blob:
        return Blob(digest, self._store.blob_size(digest) or 0)

    def _model_of(self, row: RoundRow) -> PublishedModel:
        assert row.published
        return PublishedModel(row.number, self._blob(row.published))

    def _publish_change(self) -> None:
        """Wake everyone who waits for news."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._metrics.set_phase(self._round.number, self._round.phase.value)
        contributed = set(self._round.contributions)
        watching = set(+self._watching)
        self._metrics.set_agents(
            watching=len(watching - contributed),
            contributed=len(watching & contributed),
            away=len(set(self._slots) - watching),
        )
        self._on_change(self.state_for())


def _verdict(outcome: Outcome, number: int) -> Verdict:
    if outcome is Outcome.LATE:
        text = f"round {number} had closed; this agent takes part in the next one"
        return Verdict(outcome, Reason.ROUND_CLOSED, text)
    return Verdict(outcome)


def _round_from(row: RoundRow, contributions: list[ContributionRow], policy: Policy) -> Round:
    """The round as the store remembers it."""
    by_outcome: dict[str, list[ContributionRow]] = {outcome.value: [] for outcome in Outcome}
    for contribution in contributions:
        by_outcome[contribution.outcome].append(contribution)
    return Round(
        number=row.number,
        policy=policy,
        opened_at=row.opened_at,
        initial_weights=row.initial_weights,
        phase=Phase(row.phase),
        contributions={
            item.agent_id: Contribution(
                agent_id=item.agent_id,
                weights=item.weights,
                shards=item.shards,
                num_examples=item.num_examples,
                accuracy_local=item.accuracy_local,
            )
            for item in by_outcome[Outcome.ACCEPTED.value]
        },
        rejections={
            item.agent_id: Rejection(Reason(item.reason), item.message)
            for item in by_outcome[Outcome.REJECTED.value]
        },
        late=frozenset(item.agent_id for item in by_outcome[Outcome.LATE.value]),
        published=row.published,
        failure=row.failure,
    )


def _row_of(contribution: Contribution, outcome: Outcome, now: float) -> ContributionRow:
    late = outcome is Outcome.LATE
    return ContributionRow(
        agent_id=contribution.agent_id,
        outcome=outcome.value,
        weights=contribution.weights,
        shards=contribution.shards,
        num_examples=contribution.num_examples,
        accuracy_local=contribution.accuracy_local,
        reason=Reason.ROUND_CLOSED.value if late else "",
        message="",
        at=now,
    )


def _with_half_the_batch(run: RunConfig) -> RunConfig:
    batch_size = max(1, run.fine_tune.batch_size // 2)
    return run.model_copy(update={"fine_tune": run.fine_tune.model_copy(update={"batch_size": batch_size})})


def _first_difference(stored_json: str, run: RunConfig) -> str:
    """`"run.model: mlp there, resnet50 here"`, or nothing."""
    there, here = _flat(json.loads(stored_json)), _flat(json.loads(run.model_dump_json()))
    for key, value in here.items():
        if there.get(key) != value:
            return f"{key}: {there.get(key)} there, {value} here"
    return ""


def _flat(table: Mapping[str, Any], prefix: str = "run") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, at most so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
