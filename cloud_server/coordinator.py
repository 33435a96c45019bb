"""The order of things: the only file that knows how a round goes from open to published.

One task runs `run()`. Requests from agents change the ledger meanwhile (desk.py) and wake it. Whatever a
restart must not lose is in the store before anyone is told.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, suppress
from functools import partial

import structlog

from ecavg.cloud_server import records
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.intake.uploads import Uploads
from ecavg.cloud_server.jobs import Job, Progress, Result
from ecavg.cloud_server.ledger import Ledger
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.round import Round
from ecavg.cloud_server.run import adopt_model, kept_model
from ecavg.cloud_server.showing.opening import OpeningRule
from ecavg.cloud_server.showing.presence import LIVENESS_SECONDS, Presence
from ecavg.cloud_server.showing.reports import Reports, stages
from ecavg.cloud_server.showing.standing import Standing, wait_for
from ecavg.cloud_server.showing.traffic import Traffic
from ecavg.cloud_server.showing.viewers import Viewers
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking.thread import Tracking
from ecavg.cloud_server.training.runner import JobRunner, JobWithdrawnError
from ecavg.cloud_server.upkeep.caretaker import Caretaker
from ecavg.cloud_server.upkeep.rollout import RollOut
from ecavg.common import clock, tracing
from ecavg.common.background import beside
from ecavg.common.errors import RunError
from ecavg.common.run_state import Phase, WorkProgress
from ecavg.common.tasks import kind_of

LIVENESS_POLL_SECONDS = 1.0
# Whether it is time for the next round is looked at so often, and at each change.
OPENING_POLL_SECONDS = 5.0

# The trainer's phases, in order.
_WORK = (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING)

log = structlog.get_logger()


class Coordinator:
    """The part of a server that takes the run from round to round.

    Args:
        clock: seconds since the epoch; deadlines outlive the process.
    """

    def __init__(
        self,
        config: ServerConfig,
        ledger: Ledger,
        jobs: JobRunner,
        caretaker: Caretaker,
        roll_out: RollOut,
        *,
        store: Store,
        uploads: Uploads,
        reports: Reports,
        standing: Standing,
        presence: Presence,
        viewers: Viewers,
        tracking: Tracking,
        metrics: ServerMetrics,
        traffic: Traffic,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._jobs = jobs
        self._caretaker = caretaker
        self._roll_out = roll_out
        self._store = store
        self._uploads = uploads
        self._reports = reports
        self._standing = standing
        self._presence = presence
        self._viewers = viewers
        self._tracking = tracking
        self._metrics = metrics
        self._traffic = traffic
        self._clock = clock

    async def run(self) -> None:
        """Run every round that is left, and see the agents off.

        Raises:
            RunError: the last round published no model.
        """
        async with beside(
            self._caretaker.forget_those_asked_for(), self._roll_out.follow(), self._reports.keep_up()
        ):
            await self._run_rounds()

    # ------------------------------------------------------------------ the life of a run

    async def _run_rounds(self) -> None:
        await self._reports.write_all()
        self._tracking.note_round_over()
        while not self._has_run_enough():
            if self._ledger.round.is_over:
                await self._roll_out.finish()
                await self._wait_to_open()
                await self._ledger.open_next_round()
                self._uploads.begin_round()
            with self._traced("collect"):
                await self._collect()
            with self._traced("train"):
                await self._train()
            await self._end_round()
        await self._roll_out.finish()
        self._standing.show_last_round_over()
        await self._wait_for_reports()
        await self._reports.write_changed()
        self._standing.show_run_over()
        await self._say_farewell()
        await self._viewers.stay()
        await self._tracking.finish()
        # Uploads may have come too late for the last round.
        await self._caretaker.clean_up()
        last = self._ledger.round
        if last.failure:
            raise RunError(f"round {last.number} failed: {last.failure}")

    def _traced(self, step: str) -> AbstractContextManager[None]:
        return tracing.round_span(step, self._ledger.run_id, self._ledger.round.number)

    def _has_run_enough(self) -> bool:
        """Return True after the last round asked for; 0 rounds are never enough.

        A round that was begun under a larger number may stay open.
        """
        current, asked_for = self._ledger.round, self._config.rounds
        is_last = current.number == asked_for and current.is_over
        return bool(asked_for) and (current.number > asked_for or is_last)

    async def _wait_to_open(self) -> None:
        """Wait until the next round is to open, by time or by what the agents have."""
        row = await asyncio.to_thread(self._store.round, self._ledger.round.number)
        assert row is not None
        rule = OpeningRule(self._config.opening_times, self._config.open_round_when_new_examples)
        opening = rule.after(row.phases[-1][1], self._clock())
        while True:
            changed = self._standing.next_change
            if opening.is_due(self._clock(), self._presence.num_new_examples):
                return
            self._standing.show_opening(opening)
            if not self._caretaker.seconds_to_clean_up:
                await self._caretaker.clean_up()
            # The clock may be set meanwhile, so it is looked at again and again.
            await wait_for(changed, OPENING_POLL_SECONDS)

    async def _collect(self) -> None:
        """Wait until the round closes by number or by time."""
        now = self._clock_of_round()
        while True:
            changed = self._standing.next_change
            if self._ledger.round.tick(now()) is not self._ledger.round:
                await self._note_not_ready()
                await self._ledger.transition(lambda round_: round_.tick(now()))
            if self._ledger.round.phase is not Phase.COLLECTING:
                return
            await self._draw(now())
            if not self._caretaker.seconds_to_clean_up:
                # A round may stay open for ever, so it is not only its end that cleans up.
                await self._caretaker.clean_up()
            await wait_for(changed, self._seconds_to_wait(now()))

    async def _draw(self, now: float) -> None:
        """Draw the agents that take part in the round, if it is time."""
        if self._ledger.policy.sampling:
            ready = self._presence.ready
            if self._ledger.round.draw(ready, now) is not self._ledger.round:
                await self._ledger.draw(ready, self._presence.not_ready, now)

    async def _note_not_ready(self) -> None:
        """Note whom a round that is about to close goes on without; a draw has noted that before."""
        not_ready = self._presence.not_ready - self._ledger.round.contributions.keys()
        if not_ready and not self._ledger.policy.sampling:
            await self._ledger.note_not_ready(not_ready)

    def _clock_of_round(self) -> Callable[[], float]:
        """Return a clock that says how late it is for the open round, in seconds since the epoch.

        A clock that is set while the round is open neither ends the round nor keeps it open: time is
        measured from now on. If the clock was set since the round was opened, the round begins anew.
        """
        opened_at, now = self._ledger.round.opened_at, self._clock()
        is_plausible = opened_at <= now and (opened_at >= clock.MADE_AT or now < clock.MADE_AT)
        ahead = (now if is_plausible else opened_at) - time.monotonic()
        return lambda: ahead + time.monotonic()

    def _seconds_to_wait(self, now: float) -> float:
        """Return how long it is until something happens by time alone."""
        current, seconds = self._ledger.round, self._caretaker.seconds_to_clean_up
        times = [current.deadline_at, current.draws_with_fewer_at if current.policy.sampling else None]
        return min([seconds, *(at - now for at in times if at is not None and at > now)])

    async def _end_round(self) -> None:
        """Write the report, and give up what is too old."""
        ended = self._ledger.round
        await self._caretaker.note_provenance()
        await when_disk_allows(lambda: asyncio.to_thread(self._traffic.record, ended.number))
        await self._reports.write(ended.number)
        self._tracking.note_round_over()
        tracing.end_round(self._ledger.run_id, ended.number, ended.opened_at)
        self._metrics.count_round(ended.phase.value)
        log.info("round_ended", round=ended.number, outcome=ended.phase.value, reason=ended.failure or None)
        await self._caretaker.clean_up()

    async def _wait_for_reports(self) -> None:
        """Wait until each live agent has reported on the model on offer, or the deadline passes."""
        until = time.monotonic() + self._config.deadline_seconds
        while self._ledger.round.phase is Phase.PUBLISHED and time.monotonic() < until:
            changed = self._standing.next_change
            if not self._standing.still_awaited(self._presence.live):
                return
            await wait_for(changed, LIVENESS_POLL_SECONDS)

    async def _say_farewell(self) -> None:
        """Wait until every live agent has been told that the run is over."""
        until = time.monotonic() + LIVENESS_SECONDS
        while self._presence.not_dismissed and time.monotonic() < until:
            await wait_for(self._standing.next_change, LIVENESS_POLL_SECONDS)

    # ------------------------------------------------------------------ the trainer's work

    async def _train(self) -> None:
        """Have the trainer average, fine-tune and evaluate; publish what comes back.

        All of it is done again where an agent that has contributed is forgotten meanwhile.
        """
        while not self._ledger.round.is_over:
            if obstacle := self._ledger.round.obstacle:
                await self._ledger.transition(lambda round_, obstacle=obstacle: round_.fail(obstacle))  # type: ignore[misc]
                return
            with suppress(JobWithdrawnError):
                await self._do_round_job()

    async def _do_round_job(self) -> None:
        """Have the round's job done, with its blobs at hand, and end the round with the result."""
        async with AsyncExitStack() as stack:
            in_use = partial(self._store.blobs.in_use, self._round_job().blobs)
            await when_disk_allows(lambda: stack.enter_async_context(in_use()))
            # An agent may have been forgotten meanwhile.
            job = self._round_job().model_copy(update={"traceparent": tracing.current()})
            await self._publish(job, await self._jobs.finish(job, self._show_progress))

    def _round_job(self) -> Job:
        return records.round_job(
            self._ledger.round,
            self._config.run,
            self._config.device,
            self._ledger.planned_rounds,
            self._store.rest(self._ledger.round.initial_digest),
        )

    def _check_wanted(self, job: Job) -> None:
        """Raise JobWithdrawnError if the job counts an agent that has been forgotten since."""
        if job.contributions != self._round_job().contributions:
            raise JobWithdrawnError

    async def _publish(self, job: Job, result: Result) -> None:
        """End the round with the job's result.

        Raises:
            JobWithdrawnError: the job counts an agent that has been forgotten since.
        """

        def ended(round_: Round) -> Round:
            self._check_wanted(job)
            if obstacle := self._roll_out.obstacle():
                return round_.fail(obstacle)
            if result.error or result.weights is None:
                return round_.fail(result.error.message if result.error else "the trainer gave no weights")
            return round_.publish(result.weights.sha256, records.left_out(result, self._config.run))

        with tracing.span("publish"):
            if result.weights and not result.error:
                await self._adopt(job, result)
                await self._advance_to(Phase.EVALUATING)
            canary = self._roll_out.canary_of(self._ledger.round)
            await self._ledger.transition(ended, partial(self._begin_roll_out, canary))
        if self._ledger.round.published_digest:
            self._metrics.set_scores(kind_of(self._config.run.task), stages(result))
            # An agent may have been forgotten since.
            here = [agent for agent in result.audit if self._ledger.has_joined(agent.agent_id)]
            self._metrics.set_audit(here)
            self._log_audit(result)

    def _begin_roll_out(self, canary: frozenset[str], ended: Round) -> None:
        if ended.published_digest:
            self._roll_out.begin(ended.number, canary)

    async def _adopt(self, job: Job, result: Result) -> None:
        """Make blobs of the model while nobody is forgotten."""
        directory = self._jobs.directory(job.name)

        async def adopt() -> None:
            self._check_wanted(job)
            await asyncio.to_thread(adopt_model, self._store, directory, result)

        async with AsyncExitStack() as stack:
            kept = partial(kept_model, self._store, directory, result)
            await when_disk_allows(lambda: stack.enter_async_context(kept()))
            await when_disk_allows(lambda: self._ledger.exclusively(adopt))

    async def _show_progress(self, lines: list[Progress]) -> None:
        for line in lines:
            await self._advance_to(Phase(line.phase))
        if lines:
            last = lines[-1]
            self._standing.show_progress(WorkProgress(last.done, last.total, last.loss))

    async def _advance_to(self, phase: Phase) -> None:
        """Enter a phase of the trainer's work, through those between; a job run again starts over."""
        here, there = _WORK.index(self._ledger.round.phase), _WORK.index(phase)
        again = [phase] if phase is Phase.AGGREGATING and here > there else []
        for each in again or _WORK[here + 1 : there + 1]:
            await self._ledger.transition(lambda round_, each=each: round_.advance(each))  # type: ignore[misc]

    def _log_audit(self, result: Result) -> None:
        """Log a line for whatever an operator should look into."""
        number = self._ledger.round.number
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
        if result.audit_note and any(agent.flags for agent in result.audit):
            log.warning("quarantine_refused", round=number, reason=result.audit_note)
        elif result.audit_note:
            log.info("not_audited", round=number, reason=result.audit_note)
