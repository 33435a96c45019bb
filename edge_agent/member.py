"""One device's part in a run that it has joined: the steps of each round, in order.

The member acts on what the run's latest state says is left for it to do, so it makes no difference whether
it has been here all along, has lost its connection, or has just been started again. Each step ends with saved
progress; a step that was cut short is taken again, to the same effect.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from ecavg.common import tracing
from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.config import RunConfig
from ecavg.common.errors import (
    ConflictError,
    ForbiddenError,
    NotFoundError,
    Reason,
    Refusal,
    RunError,
    UnauthenticatedError,
)
from ecavg.common.faults import Point, crash_point
from ecavg.common.progress import ProgressDisplay
from ecavg.common.run_state import Outcome, PublishedModel, RunState, Verdict
from ecavg.common.run_state import Phase as RoundPhase
from ecavg.common.tasks import kind_of
from ecavg.common.training import StepReport
from ecavg.common.transfer import Blob
from ecavg.common.wire import is_encoded
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.local_data import LocalData
from ecavg.edge_agent.metrics import AgentMetrics, Phase
from ecavg.edge_agent.new_examples import NewExamples
from ecavg.edge_agent.news import News
from ecavg.edge_agent.readiness import Readiness
from ecavg.edge_agent.state import AgentState, Arrived, Report, Trained
from ecavg.edge_agent.teller import Teller
from ecavg.edge_agent.transfers import Transfers, is_whole
from ecavg.edge_agent.updating import Updates
from ecavg.edge_agent.withdrawals import Withdrawals
from ecavg.edge_agent.worker import Worker

# One contribution is sent so often, where the server turns out not to hold what was uploaded.
MAX_SENDINGS = 3

_T = TypeVar("_T")


class Offer(NamedTuple):
    """What this agent offers to a round, beside its shards."""

    round: int
    weights: Blob
    # The file of the weights; None: the server has them.
    path: Path | None
    # The digest of the weights that pre-training started from; None: this agent's own.
    initial_weights: str | None
    score: float | None


log = structlog.get_logger()


class Member:
    """What an agent does in a run, from round to round.

    Args:
        news: where the run's states come in.
        readiness: says whether this device may take part in a round now.
        new_examples: counts the examples on this device.
        updates: tells of models that come into use.
    """

    # True if what has missed its round is offered to a later one.
    _offers_later = False

    def __init__(
        self,
        run: RunConfig,
        client: CloudClient,
        *,
        disk: AgentState,
        worker: Worker,
        data: LocalData,
        news: News,
        readiness: Readiness,
        new_examples: NewExamples,
        updates: Updates,
        metrics: AgentMetrics,
        display: ProgressDisplay,
        teller: Teller,
    ) -> None:
        self._run = run
        self._client = client
        self._disk = disk
        self._worker = worker
        self._data = data
        self._news = news
        self._readiness = readiness
        self._new_examples = new_examples
        self._updates = updates
        self._metrics = metrics
        self._display = display
        self._teller = teller
        self._transfers = Transfers(client, disk, worker, display, data)
        self._withdrawals = Withdrawals(client, disk, worker, updates, display)

    async def take_part(self) -> None:
        """Do what each state calls for, until the run is over."""
        if arrived := self._disk.progress.arrived:
            await self._go_on_with(arrived)
        # An earlier life of this agent may have ended before it told of the model in use.
        await self._updates.tell()
        await self._notice_forgetting()
        self._metrics.set_phase(Phase.WAITING)
        while await self._act_on(await self._news.next(self._is_called_for)):
            pass
        if self._updates.is_cut_off:
            # That was of a pre-trained model, in a contribution that was in vain.
            await self._updates.tell()

    async def _act_on(self, state: RunState) -> bool:
        """Do what the state calls for; return False if that is to leave."""
        taken = self._round_taken(state)
        if taken is not None:
            await self._end_taken(taken)
        elif self._withdrawals.has_news(state):
            await self._withdrawals.follow(state)
        elif self._is_new_model(state):
            await self._take_latest_model(state)
        elif self._is_lost(state):
            await self._count_as_new_again()
        elif self._is_open_round(state):
            await self._contribute_unless_in_vain(state)
        else:
            return False
        return True

    async def _notice_forgetting(self) -> None:
        """Have this agent contribute again to an open round that knows nothing of its contribution.

        The server records an outcome for every contribution that it has accepted, refused as unfit, or found
        late, before the agent is told. So a state without an outcome means that the agent was forgotten.
        This is looked at right after joining only, where no state can be older than what this agent has sent.
        A contribution that was refused without a record, as beyond a budget, is thereby sent once more each
        time that the agent joins, and no oftener.
        """
        state = await self._news.next(lambda _: True)
        is_tried = state.round == self._disk.progress.contributed_round
        if state.phase is RoundPhase.COLLECTING and not state.outcome and is_tried:
            log.info("contributing_again", round=state.round)
            await self._save(contributed_round=state.round - 1)

    def _is_called_for(self, state: RunState) -> bool:
        is_for_model = self._withdrawals.has_news(state) or self._is_new_model(state)
        is_work = is_for_model or self._is_lost(state) or self._is_open_round(state)
        has_ended = state.run_over or self._round_taken(state) is not None
        return has_ended or (is_work and self._data.is_ready)

    def _round_taken(self, state: RunState) -> int | None:
        """Return the round that has accepted a contribution before this agent heard of that; None: none has.

        An earlier life of this agent has sent it, and the round may have gone on since.
        """
        progress = self._disk.progress
        if state.accepted_weights in progress.sent_weights:
            return state.round
        offered = self._round_offered
        if not progress.sent_weights or offered is None or offered <= progress.contributed_round:
            return None
        # Of a round that is over, the state says no more than whether its model contains this agent's part.
        return offered if state.counted_round == offered else None

    @property
    def _round_offered(self) -> int | None:
        """Return the round to which this agent has offered its weights last, or is to offer them."""
        trained = self._disk.progress.trained
        return trained.round if trained else None

    def _is_new_model(self, state: RunState) -> bool:
        number, progress = state.latest_round, self._disk.progress
        return number > progress.evaluated_round or (state.is_pinned and number != progress.pinned_round)

    def _is_open_round(self, state: RunState) -> bool:
        is_new = state.round > self._disk.progress.contributed_round
        may_take_part = state.takes_part and self._readiness.is_ready
        return state.phase is RoundPhase.COLLECTING and is_new and may_take_part and not state.run_over

    def _is_in_vain(self, state: RunState) -> bool:
        """Return True if contributing is of no use any more."""
        return state.run_over

    def _has_missed(self, number: int, state: RunState) -> bool:
        """Return True if what was trained for round `number` cannot be contributed any more."""
        is_open = state.round == number and state.phase is RoundPhase.COLLECTING
        return not (is_open or self._offers_later)

    def _waits_in_vain(self, number: int, state: RunState) -> bool:
        """Return True if what was trained for round `number` has missed it, and waits for `upload_hours`."""
        trained = self._disk.progress.trained
        is_trained = trained is not None and trained.round == number
        return is_trained and self._client.upload_waits and self._has_missed(number, state)

    def _is_to_break_off(self, number: int, state: RunState) -> bool:
        """Return True if contributing ends, or goes on only after this device has given up a withdrawn model.

        A contribution may wait for days, for its round or its hours.

        Args:
            number: the round in which the contribution was begun.
        """
        is_over = self._is_in_vain(state) or self._waits_in_vain(number, state)
        return is_over or self._withdrawals.are_urgent(state)

    # ------------------------------------------------------------------ contribute

    async def _contribute_unless_in_vain(self, state: RunState) -> None:
        """Contribute, or leave that undone as soon as it is to be broken off."""
        is_to_break_off = partial(self._is_to_break_off, state.round)
        is_done = await self._news.unless(is_to_break_off, self._contribute_traced(state))
        latest = self._news.latest
        if not is_done and latest and self._has_missed(state.round, latest) and not latest.run_over:
            self._display.message(f"round {state.round} has closed: what was trained for it is not uploaded")

    async def _contribute_traced(self, state: RunState) -> None:
        with tracing.round_span("take part", self._disk.progress.run_id, state.round):
            await self._contribute(state)

    async def _contribute(self, state: RunState) -> None:
        """Pre-train on this agent's shards, upload weights and data, and commit them."""
        await self._read_again()
        async with self._uploading_shards() as uploading:
            verdict = await self._send(await self._offer(state), uploading)
        crash_point(Point.AGENT_CONTRIBUTED)
        await self._end_contribution(state.round, verdict, contributed_round=state.round)

    async def _end_taken(self, number: int) -> None:
        """End a contribution that round `number` has accepted."""
        await self._end_contribution(number, Verdict(Outcome.ACCEPTED), contributed_round=number)

    async def _read_again(self) -> None:
        """Read what has changed of the data, and keep how many examples there are: later ones are new.

        Where they cannot be read, those that have come are new until they can.
        """
        number = await self._new_examples.count()
        is_read = await self._data.read_again()
        if is_read and number != self._disk.progress.num_taken:
            await self._save(num_taken=number)

    @asynccontextmanager
    async def _uploading_shards(self) -> AsyncIterator[asyncio.Task[None]]:
        """Upload the shards meanwhile: the network would be idle while this device trains."""
        uploading = asyncio.create_task(self._transfers.upload_shards())
        try:
            yield uploading
        finally:
            uploading.cancel()
            await asyncio.gather(uploading, return_exceptions=True)

    async def _end_contribution(self, number: int, verdict: Verdict, **changes: Any) -> None:
        """Show how a contribution to round `number` ended, and save these changes of the progress."""
        outcome, message = verdict.outcome, verdict.message
        log.info("contributed", round=number, outcome=outcome, reason=message or None)
        if outcome is not Outcome.ACCEPTED:
            self._display.message(f"round {number}: contribution {outcome}: {message}")
        if number:
            changes |= self._what_is_not_new(outcome)
        await self._save(sent_weights=(), **changes)
        await self._readiness.look()
        crash_point(Point.AGENT_CONTRIBUTION_SAVED)
        self._disk.discard(self._disk.local_weights, self._disk.encoded, self._disk.checkpoint)
        self._metrics.set_phase(Phase.WAITING)

    def _what_is_not_new(self, outcome: Outcome) -> dict[str, Any]:
        """Return the changes of the progress by which the next contribution takes new time, and new data."""
        if outcome is not Outcome.ACCEPTED:
            return {"waits_since": time.time()}
        self._client.say_new_examples(0)
        progress = self._disk.progress
        return {
            "waits_since": time.time(),
            "num_contributed": progress.num_taken,
            "num_contributed_before": progress.num_contributed,
        }

    def _is_lost(self, state: RunState) -> bool:
        """Return True if the round of the last contribution has failed: its examples are to be new again."""
        is_settled = self._disk.progress.num_contributed_before is None
        return state.phase is RoundPhase.FAILED and state.outcome is Outcome.ACCEPTED and not is_settled

    async def _count_as_new_again(self) -> None:
        before = self._disk.progress.num_contributed_before
        await self._save(num_contributed=before, num_contributed_before=None)
        await self._readiness.look()

    async def _offer(self, state: RunState) -> Offer:
        """Return what this agent has pre-trained; for the warm-up, the initial weights as they are."""
        initial = state.initial_weights
        if state.is_warm_up:
            return Offer(state.round, initial, None, initial.digest, None)
        trained = await self._pretrain(state)
        path, weights = await self._encoded(trained, state)
        return Offer(trained.round, weights, path, trained.initial_weights, trained.score)

    async def _pretrain(self, state: RunState) -> Trained:
        """Return this round's weights, which an earlier life of this agent may have trained."""
        self._metrics.set_phase(Phase.PRE_TRAINING)
        trained, initial = self._disk.progress.trained, self._initial_weights(state)
        models = await self._data.models()
        if not trained or not await self._worker.run(self._is_kept, models, trained, state.round, initial):
            with tracing.span("pre-train"):
                trained = await self._train(state)
            crash_point(Point.AGENT_WEIGHTS_WRITTEN)
            changes = {} if state.is_pinned else {"pinned_round": 0}
            await self._save(trained=trained, **changes)
            crash_point(Point.AGENT_PRETRAINED)
            self._disk.discard(self._disk.checkpoint)
            await self._updates.tell()
            self._disk.discard_rests_but(trained.rest and self._disk.rest(trained.rest.digest))
        self._display.message(f"round {state.round}: local {models.metric} {trained.score:.4f}")
        self._metrics.set_score(kind_of(self._run.task), "local", trained.score)
        return trained

    async def _train(self, state: RunState) -> Trained:
        number, initial = state.round, self._initial_weights(state)
        path = await self._download_initial(state)
        models = await self._data.models()
        if state.has_full_curve:
            log.info("full_curve", round=number)
        rest = await self._rest(state.initial_rest) if path else None
        pretrain = partial(models.pretrain, rest=rest, has_full_curve=state.has_full_curve)
        label = f"round {number}: pre-training"
        async with self._teller.telling(AgentProgress(Activity.PRE_TRAINING)):
            model = await self._training(Activity.PRE_TRAINING, label, pretrain, number, path)
        async with self._teller.telling(AgentProgress(Activity.EVALUATING)):
            keep = partial(models.keep, may_use=not state.is_pinned)
            return await self._worker.run(keep, number, initial and initial.digest, model)

    def _is_kept(self, models: LocalModels, trained: Trained, number: int, initial: Blob | None) -> bool:
        """Return True if these weights are here, of this round, from that start and today's data."""
        came_from = (trained.round, trained.initial_weights, trained.shards)
        if came_from != (number, initial and initial.digest, models.trained_on):
            return False
        if trained.rest and not is_whole(self._disk.rest(trained.rest.digest), trained.rest):
            return False
        return is_whole(self._disk.local_weights, trained.weights)

    async def _encoded(self, trained: Trained, state: RunState) -> tuple[Path, Blob]:
        """Return what was pre-trained as it is uploaded: the file, and its blob."""
        if not is_encoded(self._run):
            return self._disk.local_weights, trained.weights
        models = await self._data.models()
        initial_path = await self._download_initial(state)
        blob = await self._worker.run(models.encode, trained, initial_path, state.counted_round)
        crash_point(Point.AGENT_ENCODED)
        return self._disk.encoded, blob

    async def _send(self, offer: Offer, uploading: asyncio.Task[None]) -> Verdict:
        """Upload and commit.

        Args:
            uploading: the upload of the shards, which is under way.
        """
        self._metrics.set_phase(Phase.UPLOADING)
        # An upload of the data may have waited for its hours all the while, and the round may have closed.
        self._news.ask_again()
        for attempt in range(1, MAX_SENDINGS + 1):
            try:
                await (uploading if attempt == 1 else self._transfers.upload_shards())
                if offer.path:
                    await self._transfers.upload_weights(offer.path, offer.weights)
                await self._save(sent_weights=(*self._disk.progress.sent_weights, offer.weights.digest))
                return await self._commit(offer)
            except ConflictError as error:
                return await self._verdict_on_conflict(offer.round, error)
            except (UnauthenticatedError, ForbiddenError):
                # It is the agent that is refused, not the contribution.
                raise
            except Refusal as error:
                if error.reason is not Reason.MISSING_BLOB or attempt == MAX_SENDINGS:
                    return Verdict(Outcome.REJECTED, error.reason, str(error))
                log.warning("uploading_again", round=offer.round, reason=str(error))
        raise AssertionError("the last attempt returns")

    async def _commit(self, offer: Offer) -> Verdict:
        """Make the contribution of what is offered and of the shards, which the server has."""
        models = await self._data.models()
        return await self._client.contribute(
            offer.round,
            weights=offer.weights,
            shards=list(models.shards.values()),
            num_examples=models.num_examples,
            score_local=offer.score,
            initial_weights=offer.initial_weights,
        )

    async def _verdict_on_conflict(self, number: int, error: ConflictError) -> Verdict:
        """Return whose contribution stands: this agent's own, of an earlier life, or another device's."""

        def is_known(state: RunState) -> bool:
            return state.round != number or bool(state.accepted_weights)

        state = await self._news.next(is_known)
        if state.round == number and state.accepted_weights in self._disk.progress.sent_weights:
            return Verdict(Outcome.ACCEPTED)
        return Verdict(Outcome.REJECTED, error.reason, str(error))

    def _initial_weights(self, state: RunState) -> Blob | None:
        """Return what this round's pre-training starts from; None: from weights of this agent's own."""
        if self._run.initial_weights == "independent" and state.latest_round == 0:
            return None
        return state.initial_weights

    async def _download_initial(self, state: RunState) -> Path | None:
        initial = self._initial_weights(state)
        return initial and await self._transfers.download(initial, "initial weights", state.initial_encoded)

    async def _rest(self, clouds: Blob | None) -> Path | None:
        """Return the file of the parts that do not travel: the cloud's until this agent has its own.

        Args:
            clouds: the cloud's own parts; None: all parts travel.
        """
        trained = self._disk.progress.trained
        if clouds is None:
            return None
        if trained and trained.rest:
            own = self._disk.rest(trained.rest.digest)
            if await self._worker.run(is_whole, own, trained.rest):
                return own
        return await self._transfers.fetch_rest(clouds)

    # ------------------------------------------------------------------ the global model

    async def _take_latest_model(self, state: RunState) -> None:
        """Take the published model, or a newer one where the server keeps this one no more."""
        assert state.latest_model
        try:
            with tracing.round_span("take model", self._disk.progress.run_id, state.latest_round):
                await self._take_global_model(state, state.latest_model)
        except NotFoundError as error:
            number = state.latest_round
            state = await self._news.next(lambda newer: newer.latest_round != number or newer.run_over)
            if state.latest_round == number:
                await self._give_up(number, error)

    async def _go_on_with(self, arrived: Arrived) -> None:
        """Use a model that an earlier life of this agent has measured; it may be neither here nor there."""
        try:
            path = await self._transfers.download(arrived.weights, "global model")
            rest = await self._rest(arrived.rest)
        except NotFoundError as error:
            await self._give_up(arrived.report.round, error)
        else:
            await self._use_and_report(arrived, path, rest)

    async def _give_up(self, number: int, error: NotFoundError) -> None:
        """Do without the model of a round."""
        self._display.message(f"round {number}: its model cannot be had any more: {error}")
        await self._save(evaluated_round=number, pinned_round=number, arrived=None)

    async def _take_global_model(self, state: RunState, published: PublishedModel) -> None:
        """Download, compare on this agent's own held-out data, adapt if need be, apply, report."""
        self._metrics.set_phase(Phase.DOWNLOADING)
        path = await self._transfers.download(published.weights, "global model", published.encoded)
        rest = await self._rest(published.rest)
        self._metrics.set_phase(Phase.EVALUATING)
        trained = self._disk.progress.trained
        if trained and trained.round != published.round:
            trained = None
        models = await self._data.models()
        label = f"round {published.round}: adapting"
        must_use = state.is_pinned or await self._withdrawals.concern_model_in_use(state)
        measure = partial(models.measure, rest=rest, must_use=must_use)
        async with self._teller.telling(AgentProgress(Activity.EVALUATING)):
            report = await self._training(Activity.ADAPTING, label, measure, published.round, path, trained)
        arrived = Arrived(
            weights=published.weights, report=report, rest=published.rest, is_pinned=state.is_pinned
        )
        # Once the model is replaced, the one before cannot be measured again.
        await self._save(arrived=arrived)
        crash_point(Point.AGENT_EVALUATED)
        await self._use_and_report(arrived, path, rest)

    async def _use_and_report(self, arrived: Arrived, path: Path, rest: Path | None) -> None:
        report = arrived.report
        models = await self._data.models()
        label = f"round {report.round}: adapting"
        apply = partial(models.apply, rest=rest)
        await self._training(Activity.ADAPTING, label, apply, path, report)
        crash_point(Point.AGENT_MODEL_APPLIED)
        if report.applied:
            report = await self._told(arrived)
        self._metrics.set_scores(
            kind_of(self._run.task),
            local=report.score_local,
            before=report.score_before,
            after=report.score_after,
            adapted=report.score_adapted,
        )
        await self._client.report(report)
        crash_point(Point.AGENT_REPORTED)
        await self._save(
            evaluated_round=report.round,
            pinned_round=report.round if arrived.is_pinned else 0,
            applied_reports=self._withdrawals.reports_with(report),
            arrived=None,
        )
        # No file there is of a later round yet: that one starts from this model, applied or not.
        self._disk.discard_all_but({path, rest})
        self._display.message(f"round {report.round}: {_outcome_of(report, models.metric)}")
        self._metrics.set_phase(Phase.WAITING)

    async def _told(self, arrived: Arrived) -> Report:
        """Tell of the model that has come into use, and return the report of how that went."""
        told = await self._updates.tell()
        if not told.failure:
            return arrived.report
        changes = {"applied": not told.is_rolled_back, "reason": told.failure}
        report = arrived.report.model_copy(update=changes)
        if told.is_rolled_back:
            # Without this, the model would be taken again after a restart.
            await self._save(arrived=arrived.model_copy(update={"report": report}))
        models = await self._data.models()
        await self._worker.run(models.write_report, report)
        return report

    # ------------------------------------------------------------------ small parts

    async def _training(self, activity: Activity, label: str, function: Callable[..., _T], *args: Any) -> _T:
        """Call what trains: it shows how far it is, and stops soon after this is cancelled.

        Args:
            function: takes what to call at each step for its last argument.
        """
        is_left = threading.Event()

        def show(step: StepReport) -> None:
            if is_left.is_set():
                raise RunError("stopped while training")
            self._teller.note(AgentProgress(activity, step.step, step.num_steps, step.loss))
            self._show_step(label, step)

        try:
            return await self._worker.run(function, *args, show)
        finally:
            # A thread can only end by itself.
            is_left.set()

    def _show_step(self, label: str, step: StepReport) -> None:
        self._metrics.pretrain_loss.set(step.loss)
        self._metrics.progress_ratio.set(step.step / step.num_steps)
        self._display.update(label, step.step, step.num_steps, f"loss {step.loss:.3f}")

    async def _save(self, **changes: Any) -> None:
        await self._worker.run(self._disk.save, self._disk.progress.model_copy(update=changes))


def _outcome_of(report: Report, metric: str) -> str:
    if not report.applied:
        return f"kept its own model: {report.reason}"
    before = "none" if report.score_before is None else f"{report.score_before:.4f}"
    adapted = "" if report.score_adapted is None else f", adapted {report.score_adapted:.4f}"
    return f"{metric} before {before}, after {report.score_after:.4f}{adapted}, applied"
