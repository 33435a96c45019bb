"""The order of things: the only file that knows how a round goes from open to published.

One task runs `run()`; requests from agents change the round under one lock and wake it. Whatever a
restart must not lose is in the store before anyone is told.
"""

import asyncio
import math
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from cloud_server import records
from cloud_server.config import ServerConfig
from cloud_server.contribution import Contribution, Decision, Rejection
from cloud_server.disk.failures import when_disk_allows
from cloud_server.disk.tables import EncodingRow, ForgettingRow, ReportRow, RoundRow
from cloud_server.intake.uploads import UNFIT, Upload, Uploads
from cloud_server.jobs import Job, JobError, Progress, Result
from cloud_server.metrics import ServerMetrics
from cloud_server.round import Policy, Round
from cloud_server.showing.presence import LIVENESS_SECONDS, Presence
from cloud_server.showing.reports import Reports, stages
from cloud_server.showing.standing import Standing, wait_for
from cloud_server.store import Store
from cloud_server.training.runner import JobRunner, JobWithdrawnError, Trainer
from cloud_server.upkeep import forgetting, forgotten, provenance, retention
from common import schema
from common.config import RunConfig, Wire
from common.errors import BudgetError, InvalidError, NotFoundError, Reason, RunError, StorageError, UsageError
from common.faults import Point, crash_point
from common.run_state import Outcome, Phase, RunState, Verdict, WorkProgress
from common.transfer import Blob, to_the_end
from common.wire import wire_of

LIVENESS_POLL_SECONDS = 1.0
FORGET_POLL_SECONDS = 0.5
CUT_OFF_SECONDS = 5.0  # more than it takes until the last call of an agent that was revoked has ended
CLEAN_UP_SECONDS = 3600.0  # between two clean-ups, at most, while a round collects

_WORK = (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING)  # the trainer's phases, in order

_T = TypeVar("_T")

log = structlog.get_logger()


@dataclass(frozen=True)
class Membership:
    """What an agent learns when it joins."""

    run_id: str
    run: RunConfig
    slot: int
    num_partitions: int


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
        self._jobs = JobRunner(store.state_dir.jobs, trainer, config.max_attempts, self._wanted)
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._reports = Reports(config.run, store)
        self._policy = Policy(
            min_agents=config.min_agents,
            max_agents=config.agents_to_close,
            deadline_seconds=config.deadline_seconds,
            on_too_few=config.on_too_few,
        )
        self._lock = asyncio.Lock()
        self._slots: dict[str, int] = {}
        self._forgotten_at: dict[str, float] = {}  # by the monotonic clock
        self._clean_up_at = 0.0
        self._run_id: str  # this and what follows: set by start()
        self._round: Round
        self._uploads: Uploads
        self._presence: Presence
        self._standing: Standing

    # ------------------------------------------------------------------ the life of a run

    async def start(self) -> None:
        """Find the run in the state directory, or begin it.

        Raises:
            UsageError: the directory holds another run, or the run's model cannot be built.
        """
        run = await asyncio.to_thread(self._store.run)
        if run is None:
            await self._begin_run()
        elif difference := records.first_difference(run.config_json, self._config.run):
            raise UsageError(
                f"{self._config.state_dir} holds a run with another configuration ({difference});"
                " give that one, or another --state-dir"
            )
        for row in await asyncio.to_thread(self._to_forget):  # asked for before, and not done to the end
            await when_disk_allows(partial(self._remove_all_of, row))
        await self._note_provenance(provenance.write)
        self._restore()
        await self._clean_up()

    async def run(self) -> None:
        """Run every round that is left, and see the agents off.

        Raises:
            RunError: the last round published no model.
        """
        forgetting = asyncio.create_task(self._forget_those_asked_for())
        try:
            await self._run_rounds()
        finally:
            forgetting.cancel()
            await asyncio.wait([forgetting])

    async def _run_rounds(self) -> None:
        if self._round.is_over:  # the last life may have ended before the report was written
            await self._reports.write(self._round.number)
        while not self._has_run_enough():
            if self._round.is_over:
                await self._open_next_round()
            await self._collect()
            if not self._round.is_over:
                await self._train()
            await self._end_round()
        await self._wait_for_reports()
        self._standing.show_run_over()
        await self._say_farewell()
        await self._clean_up()  # of what came too late for the last round
        if self._round.failure:
            raise RunError(f"round {self._round.number} failed: {self._round.failure}")

    def _has_run_enough(self) -> bool:
        """0 rounds are never enough. A round begun under a larger number may stay open."""
        number, asked_for = self._round.number, self._config.rounds
        return bool(asked_for) and (number > asked_for or (number == asked_for and self._round.is_over))

    async def _begin_run(self) -> None:
        """Have the trainer build the model: its weights are the start, its names and shapes the gate."""
        job = records.initialise_job(self._config.run, self._config.device)
        self._jobs.directory(job.name).remove()  # of a start that failed
        result = await self._jobs.finish(job)
        if result.error or result.weights is None:
            error = result.error or JobError(kind="failed", message="the trainer gave no weights")
            raise (UsageError if error.kind == "usage" else RunError)(error.message)
        await self._adopt(job, result)
        run_id, run_json = uuid.uuid4().hex, self._config.run.model_dump_json()
        await asyncio.to_thread(
            self._store.create_run, run_id, run_json, result.weights.sha256, self._clock()
        )
        crash_point(Point.SERVER_RUN_CREATED)

    def _restore(self) -> None:
        """Take everything up where the last life of this server left it."""
        run, rows = self._store.run(), self._store.rounds()
        assert run is not None
        self._run_id = run.run_id
        self._slots = {agent.agent_id: agent.slot for agent in self._store.agents()}
        first, last = rows[0], rows[-1]
        self._uploads = Uploads(
            self._store,
            weights_schema=schema.read_header(self._store.blobs.path(first.initial_weights)).schema,
            wires=self._contributed_wires(),
            spec=self._config.run.spec,
            max_data_bytes=self._config.max_upload_bytes,
            num_agents=self._policy.max_agents,
            agent_bytes=self._config.max_agent_bytes,
            round_bytes=self._config.max_round_bytes,
            on_received=self._metrics.count_received,
        )
        self._round = self._recorded(last)
        self._presence = Presence(expected=self._round.contributions)
        self._standing = Standing(
            run.run_id,
            self._round,
            self._slots,
            self._presence,
            store=self._store,
            reports=self._reports,
            metrics=self._metrics,
            on_change=self._on_change,
        )

    def _contributed_wires(self) -> tuple[Wire, ...]:
        """How contributions may be encoded: those from weights of the agents' own have no common base."""
        run = self._config.run
        alone = (wire_of(run.wire, None),) if run.initial_weights == "independent" else ()
        return tuple(dict.fromkeys((run.wire, *alone)))

    def _recorded(self, row: RoundRow) -> Round:
        is_independent = self._config.run.initial_weights == "independent"
        return records.round_from(
            row,
            self._store.contributions(row.number),
            self._policy,
            may_be_independent=is_independent and not self._store.has_published(),
        )

    async def _collect(self) -> None:
        """Wait until the round closes by number or by time."""
        while True:
            changed = self._standing.next_change
            await self._transition(lambda round_: round_.tick(self._clock()))
            if self._round.phase is not Phase.COLLECTING:
                return
            if self._clock() >= self._clean_up_at:  # a round may stay open for ever
                await self._clean_up()
            await wait_for(changed, self._seconds_to_wait())

    def _seconds_to_wait(self) -> float:
        """Until something happens by time alone."""
        now, deadline = self._clock(), self._round.deadline_at
        seconds = max(0.0, self._clean_up_at - now)
        return seconds if deadline is None or deadline <= now else min(seconds, deadline - now)

    async def _train(self) -> None:
        """Average, fine-tune and evaluate in the trainer; publish what comes back.

        All of it again, where an agent that has contributed is forgotten meanwhile.
        """
        while not self._round.is_over:
            if not self._round.contributions:
                await self._transition(
                    lambda round_: round_.fail("every agent that contributed is forgotten")
                )
                return
            job = self._round_job()
            with suppress(JobWithdrawnError):
                await self._publish(job, await self._jobs.finish(job, self._show_progress))

    async def _publish(self, job: Job, result: Result) -> None:
        """Raises JobWithdrawnError."""

        def ended(round_: Round) -> Round:
            self._check_wanted(job)
            if result.error or result.weights is None:
                return round_.fail(result.error.message if result.error else "the trainer gave no weights")
            return round_.publish(result.weights.sha256, records.left_out(result, self._config.run))

        if result.weights and not result.error:
            await self._adopt(job, result)
            await self._advance_to(Phase.EVALUATING)
        await self._transition(ended)
        if self._round.published:
            self._metrics.set_accuracies(stages(result))
            # Somebody may have been forgotten since.
            self._metrics.set_audit([agent for agent in result.audit if agent.agent_id in self._slots])
            self._log_audit(result)

    def _log_audit(self, result: Result) -> None:
        """A line for whatever an operator should look into."""
        number = self._round.number
        for agent in result.audit:
            if agent.scale < 1:
                log.warning("update_clipped", round=number, agent_id=agent.agent_id, scale=agent.scale)
            if agent.flags or agent.left_out:
                log.warning(
                    "agent_flagged",
                    round=number,
                    agent_id=agent.agent_id,
                    flags=agent.flags,
                    left_out=agent.left_out and agent.left_out.value,
                )
        if result.audit_note:
            log.warning("quarantine_refused", round=number, reason=result.audit_note)

    def _round_job(self) -> Job:
        return records.round_job(self._round, self._config.run, self._config.device)

    @asynccontextmanager
    async def _wanted(self, job: Job) -> AsyncIterator[None]:
        """Nobody is forgotten meanwhile. Raises JobWithdrawnError: the job counts somebody who has been."""
        async with self._lock:
            self._check_wanted(job)
            yield

    def _check_wanted(self, job: Job) -> None:
        if job.kind == "round" and job.contributions != self._round_job().contributions:
            raise JobWithdrawnError

    async def _end_round(self) -> None:
        """Write the report, and give up what is too old."""
        number, outcome = self._round.number, self._round.phase.value
        await self._note_provenance(provenance.add_last_round)
        await self._reports.write(number)
        self._metrics.count_round(outcome)
        log.info("round_ended", round=number, outcome=outcome, reason=self._round.failure or None)
        await self._clean_up()

    async def _note_provenance(self, note: Callable[[Store], None]) -> None:
        """Have provenance.jsonl say what the records do."""

        async def locked() -> None:
            async with self._reports.lock:
                await asyncio.to_thread(note, self._store)

        await when_disk_allows(locked)

    async def _open_next_round(self) -> None:
        """From the last global model on, or from where the failed round started."""

        async def open_round() -> None:
            number = self._round.number + 1
            start = self._round.published or self._round.initial_weights
            await asyncio.to_thread(self._store.open_round, number, start, self._clock())
            crash_point(Point.SERVER_ROUND_OPENED)
            row = self._store.last_round()
            assert row is not None
            self._uploads.budgets.begin_round()
            self._believe(self._recorded(row))

        await when_disk_allows(lambda: self._exclusively(open_round))

    async def _clean_up(self) -> None:
        """Remove what old rounds have left; a disk that does not let it is no reason to stop."""
        async with self._lock, self._reports.lock:
            try:
                await asyncio.to_thread(
                    retention.clean_up,
                    self._store,
                    keep_rounds=self._config.keep_rounds,
                    keep_partial_seconds=self._config.keep_partial_seconds,
                    now=self._clock(),
                    retain_data=self._config.run.retain_data,
                    active=self._uploads.active,
                )
            except (OSError, StorageError) as error:
                log.warning("clean_up_failed", reason=str(error))
        seconds = max(1.0, min(CLEAN_UP_SECONDS, self._config.keep_partial_seconds))
        self._clean_up_at = self._clock() + seconds
        self._uploads.budgets.look_again()

    async def _wait_for_reports(self) -> None:
        """Until every live agent has reported on the published model, or the deadline passes."""
        until = time.monotonic() + self._config.deadline_seconds
        while self._round.phase is Phase.PUBLISHED and time.monotonic() < until:
            changed = self._standing.next_change
            rows = await asyncio.to_thread(self._store.reports, self._round.number)
            if self._presence.live <= {row.agent_id for row in rows}:
                return
            await wait_for(changed, LIVENESS_POLL_SECONDS)

    async def _say_farewell(self) -> None:
        """Until every live agent has been told that the run is over."""
        until = time.monotonic() + LIVENESS_SECONDS
        while self._presence.not_dismissed and time.monotonic() < until:
            await wait_for(self._standing.next_change, LIVENESS_POLL_SECONDS)

    # ------------------------------------------------------------------ what agents ask for

    async def join(self, agent_id: str) -> Membership:
        """The agent's membership, the same whenever it asks.

        Raises:
            BudgetError: it would be one agent too many.
            NotFoundError: the agent has just been forgotten.
        """

        async def enter() -> None:
            if agent_id in self._slots:
                return
            if self._forgotten_at.get(agent_id, -math.inf) > time.monotonic() - CUT_OFF_SECONDS:
                raise NotFoundError(f"agent {agent_id} has just been forgotten", Reason.UNKNOWN_AGENT)
            if len(self._slots) >= self._config.joined:
                raise BudgetError(
                    f"{len(self._slots)} agents have joined this run, and it takes no more: ask the server's"
                    " operator to raise max_joined",
                    Reason.RUN_FULL,
                )
            slot = await asyncio.to_thread(self._store.join, agent_id, self._clock())
            crash_point(Point.SERVER_AGENT_JOINED)
            self._uploads.let_in(agent_id)
            self._slots[agent_id] = slot
            log.info("agent_joined", agent_id=agent_id, slot=slot)
            self._standing.look_again()

        if agent_id not in self._slots:
            await self._exclusively(enter)
        return Membership(
            run_id=self._run_id,
            run=self._config.run,
            slot=self._slots[agent_id],
            num_partitions=self._config.run.num_partitions or self._policy.max_agents,
        )

    def watch(self, agent_id: str) -> AsyncIterator[RunState]:
        """The state now, then again after each change; slow readers skip states, never the latest."""
        self._check_joined(agent_id)
        return self._standing.watch(agent_id)

    async def query_upload(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        self._check_joined(agent_id)
        return await self._uploads.query(agent_id, kind, digest)

    @asynccontextmanager
    async def receive(self, agent_id: str, kind: str, blob: Blob, offset: int) -> AsyncIterator[Upload]:
        """Take in a blob; one that is unfit, or too much, counts as this agent's rejected contribution."""
        self._check_joined(agent_id)
        try:
            async with self._uploads.open(agent_id, kind, blob, offset, self._clock()) as upload:
                yield upload
        except (InvalidError, BudgetError) as error:
            if error.reason in UNFIT:
                await self._reject(agent_id, error.reason, str(error))
            raise

    async def contribute(self, agent_id: str, number: int, contribution: Contribution) -> Verdict:
        """Commit uploaded blobs to round `number`; durable when this returns.

        Raises:
            ConflictError: another contribution of this agent stands.
            NotFoundError: a blob it names has not been uploaded by this agent.
            InvalidError: the round does not exist yet; or it starts from other initial weights, and then
                this is a rejected contribution.
        """
        self._check_joined(agent_id)

        async def commit() -> Outcome:
            self._check_joined(agent_id)  # still
            if not 1 <= number <= self._round.number:
                raise InvalidError(f"round {number} is not open; round {self._round.number} is")
            if number < self._round.number:
                return await self._contribute_to_past_round(number, contribution)
            counted = contribution
            # Afterwards its blobs may be gone, and the answer does not depend on them.
            if self._round.phase is Phase.COLLECTING:
                counted = await self._checked(contribution)
            updated, outcome = self._round.contribute(counted)
            if updated is not self._round:
                await self._record_contribution(number, counted, outcome)
                self._believe(updated)
            return outcome

        try:
            outcome = await self._exclusively(commit)
        except InvalidError as error:
            if error.reason is Reason.INITIAL_WEIGHTS:
                await self._reject(agent_id, error.reason, str(error))
            raise
        if outcome is not Outcome.LATE:
            return Verdict(outcome)
        if number < self._round.number:
            await self._reports.write(number)  # which names the late
        text = f"round {number} had closed; this agent takes part in the next one"
        return Verdict(outcome, Reason.ROUND_CLOSED, text)

    async def report(self, agent_id: str, number: int, row: ReportRow) -> None:
        """Keep what became of a published model on a device.

        Raises:
            NotFoundError: that round has published nothing.
        """
        self._check_joined(agent_id)
        round_row = await asyncio.to_thread(self._store.round, number)
        if round_row is None or round_row.published is None:
            raise NotFoundError(f"round {number} has published no model", Reason.MALFORMED_REQUEST)
        row = replace(row, at=self._clock())

        async def record() -> bool:
            self._check_joined(agent_id)  # still
            return await asyncio.to_thread(self._store.record_report, number, row)

        is_first = await self._exclusively(record)
        if is_first:
            self._metrics.count_report(row.applied)
        crash_point(Point.SERVER_AGENT_REPORT_RECORDED)
        await self._reports.write(number)
        log.info("agent_reported", round=number, agent_id=agent_id, applied=row.applied)
        self._standing.look_again()

    async def readable_blob(self, agent_id: str, digest: str) -> Path:
        """Where an agent's download is read from.

        Raises:
            NotFoundError: the digest is neither initial weights nor a published model.
        """
        self._check_joined(agent_id)
        if await asyncio.to_thread(self._store.is_public, digest):
            return self._store.blobs.path(digest)
        raise NotFoundError(f"no initial weights or published model has the digest {digest[:16]}…")

    def count_sent(self, num_bytes: int) -> None:
        self._metrics.count_sent("model", num_bytes)

    def state_for(self, agent_id: str | None = None) -> RunState:
        return self._standing.state_for(agent_id)

    async def status(self) -> Mapping[str, Any]:
        """What the status page shows; see common/telemetry.py for where."""
        return await self._standing.status(self._clock())

    # ------------------------------------------------------------------ the trainer's work

    async def _show_progress(self, lines: list[Progress]) -> None:
        for line in lines:
            await self._advance_to(Phase(line.phase))
        if lines:
            last = lines[-1]
            self._standing.show_progress(WorkProgress(last.done, last.total, last.loss))

    async def _advance_to(self, phase: Phase) -> None:
        """Enter a phase of the trainer's work, through those between; a job run again starts over."""
        here, there = _WORK.index(self._round.phase), _WORK.index(phase)
        again = [phase] if phase is Phase.AGGREGATING and here > there else []
        for each in again or _WORK[here + 1 : there + 1]:
            await self._transition(lambda round_, each=each: round_.advance(each))  # type: ignore[misc]

    async def _adopt(self, job: Job, result: Result) -> None:
        """Make blobs of the model and of what it travels as; adopted again, they are where they were."""
        assert result.weights
        directory, weights, encoded = self._jobs.directory(job.name), result.weights, result.encoded

        async def adopt() -> None:
            async with self._wanted(job):
                await asyncio.to_thread(self._store.blobs.adopt, directory.weights_path, weights.sha256)
                crash_point(Point.SERVER_MODEL_ADOPTED)
                if encoded:
                    row = EncodingRow(encoded.sha256, encoded.base)
                    await asyncio.to_thread(self._store.blobs.adopt, directory.encoded_path, encoded.sha256)
                    await asyncio.to_thread(self._store.record_encoding, weights.sha256, row)
                    crash_point(Point.SERVER_ENCODED_MODEL_ADOPTED)

        await when_disk_allows(lambda: to_the_end(adopt()))

    # ------------------------------------------------------------------ who is forgotten

    async def _forget_those_asked_for(self) -> None:
        """Forget whom another process wants forgotten, for as long as this runs."""
        while True:
            try:
                for row in await asyncio.to_thread(self._to_forget):
                    await self._forget(row)
            except (OSError, StorageError, RunError, sqlite3.Error) as error:  # tried again
                log.error("forgetting_failed", reason=str(error))
            await asyncio.sleep(FORGET_POLL_SECONDS)

    def _to_forget(self) -> list[ForgettingRow]:
        return forgotten.to_forget(self._store)

    async def _forget(self, row: ForgettingRow) -> None:
        agent_id = row.agent_id
        assert agent_id is not None

        async def change() -> None:
            self._forgotten_at[agent_id] = time.monotonic()
            self._slots.pop(agent_id, None)
            self._presence.forget(agent_id)
            await self._uploads.shut_out(agent_id)
            async with self._reports.lock:
                self._standing.forget(agent_id)
                self._believe(self._round.without(agent_id))  # now: whatever fails below, it does not count
                await self._remove_all_of(row)
                self._standing.forget(agent_id)  # what was read from the files meanwhile

        await self._exclusively(change)

    async def _remove_all_of(self, row: ForgettingRow) -> None:
        """The part of it that is on the disk; see cloud_server/upkeep/forgetting.py."""
        assert row.agent_id is not None
        work = await asyncio.to_thread(forgetting.unfinished_work, self._store, row.agent_id)
        if work:
            work.withdraw()  # not in a thread: nobody shall see it come between two looks
            await self._trainer.restart()
        await asyncio.to_thread(forgetting.forget, self._store, row, self._clock())
        log.warning("agent_forgotten", pseudonym=row.pseudonym)

    # ------------------------------------------------------------------ changes of the round

    async def _exclusively(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """Change the round, one at a time, and to the end: record first, then memory."""

        async def locked() -> _T:
            async with self._lock:
                return await change()

        return await to_the_end(locked())

    def _believe(self, updated: Round) -> None:
        """Go on with the round as it is on record now, and let everyone know."""
        self._round = updated
        self._standing.show(updated)

    async def _transition(self, change: Callable[[Round], Round]) -> None:
        """Make a change of phase durable, then true and known."""

        async def record() -> None:
            updated = change(self._round)
            if updated is self._round:
                return
            await asyncio.to_thread(
                self._store.set_phase,
                updated.number,
                updated.phase.value,
                self._clock(),
                failure=updated.failure,
                published=updated.published,
                left_out={
                    agent_id: (why.reason.value, why.message) for agent_id, why in updated.left_out.items()
                },
            )
            crash_point(Point.SERVER_PHASE_RECORDED)
            self._believe(updated)
            log.info("phase", round=updated.number, phase=updated.phase.value)

        await when_disk_allows(lambda: self._exclusively(record))

    async def _checked(self, contribution: Contribution) -> Contribution:
        """With what its shards hold. Under the lock: no clean-up comes between the checks and the record."""
        await self._uploads.check_complete(contribution)
        if self._config.run.wire == "int8":
            await self._uploads.check_base(contribution.weights_digest, contribution.initial_digest)
        num_shared = await self._uploads.count_shared(contribution.shard_digests, contribution.num_examples)
        return replace(contribution, num_shared=num_shared)

    async def _contribute_to_past_round(self, number: int, contribution: Contribution) -> Outcome:
        """LATE, and known to have been; accepted, if that is what it was in its time."""
        decisions = await asyncio.to_thread(self._store.contributions, number)
        known = {decision.agent_id: decision for decision in decisions}.get(contribution.agent_id)
        if known and known.contribution:
            is_this_one = known.contribution.weights_digest == contribution.weights_digest
            return Outcome.ACCEPTED if is_this_one else Outcome.LATE
        if known is None:
            await self._record_contribution(number, contribution, Outcome.LATE)
        return Outcome.LATE

    async def _record_contribution(self, number: int, contribution: Contribution, outcome: Outcome) -> None:
        now = self._clock()
        agent_id = contribution.agent_id
        if outcome is Outcome.ACCEPTED:
            decision = Decision(agent_id, outcome, now, contribution)
        else:
            # Nobody has looked whether the blobs that a late contribution names are here.
            decision = Decision(agent_id, outcome, now, why=Rejection(Reason.ROUND_CLOSED, ""))
        await asyncio.to_thread(self._store.record_contribution, number, decision)
        crash_point(Point.SERVER_CONTRIBUTION_RECORDED)
        self._uploads.budgets.look_again_at(agent_id)
        self._metrics.count_contribution(outcome.value)
        log.info("contribution", round=number, agent_id=agent_id, outcome=outcome.value)

    async def _reject(self, agent_id: str, reason: Reason, message: str) -> None:
        async def record() -> None:
            updated = self._round.reject(agent_id, reason, message)
            if agent_id not in self._slots or updated is self._round:
                return
            why = updated.rejections[agent_id]
            decision = Decision(agent_id, Outcome.REJECTED, self._clock(), why=why)
            await asyncio.to_thread(self._store.record_contribution, updated.number, decision)
            self._believe(updated)
            self._metrics.count_contribution(Outcome.REJECTED.value)
            log.warning("contribution_rejected", round=updated.number, agent_id=agent_id, reason=reason.value)

        await self._exclusively(record)

    def _check_joined(self, agent_id: str) -> None:
        if agent_id not in self._slots:
            raise NotFoundError(f"agent {agent_id} has not joined this run", Reason.UNKNOWN_AGENT)
