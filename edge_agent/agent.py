"""The life of an agent: pre-train, upload, contribute, wait, compare the global model, apply it, report.

The agent acts on what the run's latest state says is left for it to do, so it makes no difference
whether it has been here all along, has lost its connection, or has just been started again. Each step
ends with saved progress; one that was cut short is taken again, to the same effect.
"""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import structlog

from common import rpc
from common.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Reason,
    Refusal,
    RunError,
    UnauthenticatedError,
    UsageError,
)
from common.faults import Point, crash_point
from common.telemetry import ProgressDisplay
from common.training import StepReport, select_device
from common.transfer import Blob, Encoded, blob_of
from common.wire import Base, decode
from edge_agent.client import CloudClient, Joined, Kind, OnBytes, RunState, UnknownAgentError
from edge_agent.config import AgentConfig
from edge_agent.data import data_stamp
from edge_agent.local import LocalModels, load_local_models
from edge_agent.metrics import AgentMetrics, Phase
from edge_agent.news import News
from edge_agent.state import AgentState, Arrived, Progress, Report, Trained
from edge_agent.worker import Worker

LAST_SECONDS = 60.0  # without a word from the server, when the run is over and a model is left to take
MAX_SENDINGS = 3  # of one contribution, where the server turns out not to hold what was uploaded

_T = TypeVar("_T")

log = structlog.get_logger()


class EdgeAgent:
    """One device's part in a run."""

    def __init__(
        self,
        config: AgentConfig,
        state: AgentState,
        client: CloudClient,
        metrics: AgentMetrics,
        display: ProgressDisplay,
    ) -> None:
        self._config = config
        self._disk = state
        self._client = client
        self._metrics = metrics
        self._display = display
        self._device = select_device(config.device)
        self._worker = Worker(display.message)
        self._news = News()
        self._shown_failure = 0  # the round
        self._shown_left_out = 0  # the round
        self._fetched: Blob | None = None  # the last download, known to be whole
        self._joined: Joined  # set by run()
        self._loading: asyncio.Future[LocalModels]

    async def run(self) -> None:
        """Take part in every round until the server says that the run is over.

        Raises:
            UsageError: the data or the run's model cannot be used on this device.
        """
        backoff = rpc.Backoff()
        try:
            while not self._news.is_over:
                try:
                    await self._join()
                    await self._take_part()
                except UnknownAgentError:
                    self._display.message("the server has begun another run")
                    await asyncio.sleep(backoff())
        except Refusal as error:
            if not (self._news.is_over and rpc.is_retried(error)):
                raise
            self._display.message(f"the run ended, and the server was gone before the end of it: {error}")
        finally:
            self._worker.close()
        self._metrics.set_phase(Phase.DONE)

    async def _join(self) -> None:
        self._metrics.set_phase(Phase.CONNECTING)
        self._news.latest = None  # it may have been another run's
        self._joined = await self._client.join()
        if self._joined.run_id != self._disk.progress.run_id:
            self._disk.discard_residuals_but(self._disk.residual(0))
            await self._worker.run(self._disk.save, Progress(run_id=self._joined.run_id))
            self._disk.discard_all_but(())
            self._shown_failure = self._shown_left_out = 0
        crash_point(Point.AGENT_JOINED)
        self._display.message(
            f"joined as {self._disk.agent_id}, slot {self._joined.slot}:"
            f" {self._joined.run.model} on {self._joined.run.dataset}"
        )

    async def _take_part(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow())  # from now on, so that we hear of the run's end
                self._loading = tasks.create_task(self._load())
                self._loading.add_done_callback(lambda _: self._news.look_again())
                await self._follow_up()
                self._loading.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _follow_up(self) -> None:
        """Do what each state calls for."""
        if arrived := self._disk.progress.arrived:
            await self._go_on_with(arrived)
        await self._notice_forgetting()
        while True:
            state = await self._news.next(self._is_called_for)
            if self._is_new_model(state):
                await self._take_latest_model(state)
            elif self._is_open_round(state):
                await self._news.while_run_lasts(self._contribute(state))
            else:
                return

    async def _notice_forgetting(self) -> None:
        """Have this agent contribute again to an open round that knows nothing of its contribution.

        No outcome means that: every contribution that the server has taken, refused as unfit, or found late
        has one, on record before the agent is told. Only here, right after joining, where no state can be
        older than what this agent has sent. What was refused without a record, as beyond a budget, is
        thereby sent once more each time that the agent joins, and no oftener.
        """
        state = await self._news.next(lambda _: True)
        is_tried = state.round == self._disk.progress.contributed_round
        if state.phase == "collecting" and not state.outcome and is_tried:
            log.info("contributing_again", round=state.round)
            await self._save(contributed_round=state.round - 1)

    def _is_called_for(self, state: RunState) -> bool:
        is_work = self._is_new_model(state) or self._is_open_round(state)
        return state.run_over or (is_work and self._loading.done())

    def _is_new_model(self, state: RunState) -> bool:
        return state.latest_round > self._disk.progress.evaluated_round

    def _is_open_round(self, state: RunState) -> bool:
        is_new = state.round > self._disk.progress.contributed_round
        return state.phase == "collecting" and is_new and not state.run_over

    # ------------------------------------------------------------------ what a round asks of an agent

    async def _contribute(self, state: RunState) -> None:
        """Pre-train on this agent's shards, upload weights and data, and commit them."""
        if state.outcome == "accepted":  # in an earlier life, which ended before it heard of it
            outcome, message = state.outcome, ""
        else:
            await self._read_what_has_changed()
            # The network would be idle while this device trains.
            uploading = asyncio.create_task(self._upload_shards())
            try:
                trained = await self._pretrain(state)
                self._metrics.set_phase(Phase.UPLOADING)
                outcome, message = await self._send(trained, state, uploading)
            finally:
                uploading.cancel()
                await asyncio.gather(uploading, return_exceptions=True)
            crash_point(Point.AGENT_CONTRIBUTED)
        log.info("contributed", round=state.round, outcome=outcome, reason=message or None)
        if outcome != "accepted":
            self._display.message(f"round {state.round}: contribution {outcome}: {message}")
        await self._save(contributed_round=state.round)
        crash_point(Point.AGENT_CONTRIBUTION_SAVED)
        self._disk.discard(self._disk.local_weights, self._disk.encoded, self._disk.checkpoint)
        self._metrics.set_phase(Phase.WAITING)

    async def _pretrain(self, state: RunState) -> Trained:
        """This round's weights, which an earlier life of this agent may have trained."""
        self._metrics.set_phase(Phase.PRE_TRAINING)
        trained, initial = self._disk.progress.trained, self._initial_weights(state)
        local = await self._models()
        if not trained or not await self._worker.run(self._is_kept, local, trained, state.round, initial):
            trained = await self._train(state)
            crash_point(Point.AGENT_WEIGHTS_WRITTEN)
            await self._save(trained=trained)
            crash_point(Point.AGENT_PRETRAINED)
            self._disk.discard(self._disk.checkpoint)
        self._display.message(f"round {state.round}: local accuracy {trained.accuracy:.4f}")
        self._metrics.accuracy_ratio.labels("local").set(trained.accuracy)
        return trained

    async def _train(self, state: RunState) -> Trained:
        number, initial = state.round, self._initial_weights(state)
        path = await self._download_initial(state)
        local = await self._models()
        model = await self._training(f"round {number}: pre-training", local.pretrain, number, path)
        return await self._worker.run(local.keep, number, initial and initial.digest, model)

    async def _encoded(self, trained: Trained, state: RunState) -> tuple[Path, Blob]:
        """What was pre-trained, as it is uploaded."""
        if self._joined.run.wire == "float32":
            return self._disk.local_weights, trained.weights
        local = await self._models()
        initial = await self._download_initial(state)
        blob = await self._worker.run(local.encode, trained, initial, state.counted_round)
        crash_point(Point.AGENT_ENCODED)
        return self._disk.encoded, blob

    def _is_kept(self, local: LocalModels, trained: Trained, number: int, initial: Blob | None) -> bool:
        """Whether this was trained for this round, from there, on the data of today, and is still there."""
        came_from = (trained.round, trained.initial_weights, trained.shards)
        if came_from != (number, initial and initial.digest, local.trained_on):
            return False
        return _is_whole(self._disk.local_weights, trained.weights)

    def _initial_weights(self, state: RunState) -> Blob | None:
        """What this round's pre-training starts from; None: from weights of this agent's own."""
        if self._joined.run.initial_weights == "independent" and state.latest_round == 0:
            return None
        return state.initial_weights

    async def _send(
        self, trained: Trained, state: RunState, uploading: asyncio.Task[None]
    ) -> tuple[str, str]:
        """Upload and commit; the outcome, and why.

        Args:
            uploading: the shards, so far.
        """
        local = await self._models()
        path, weights = await self._encoded(trained, state)
        for attempt in range(1, MAX_SENDINGS + 1):
            try:
                await (uploading if attempt == 1 else self._upload_shards())
                show = self._bar("upload weights")
                await self._upload(path, weights, "weights", show)
                return await self._client.contribute(
                    trained.round,
                    weights=weights,
                    shards=list(local.shards.values()),
                    num_examples=local.num_examples,
                    accuracy_local=trained.accuracy,
                    initial_weights=trained.initial_weights,
                )
            except ConflictError as error:
                return "accepted", str(error)  # an earlier life of this agent has contributed
            except (UnauthenticatedError, ForbiddenError):
                raise  # it is the agent that is refused, not the contribution
            except Refusal as error:
                if error.reason is not Reason.MISSING_BLOB or attempt == MAX_SENDINGS:
                    return "rejected", str(error)
                log.warning("uploading_again", round=trained.round, reason=str(error))
        raise AssertionError("the last attempt returns")

    async def _take_latest_model(self, state: RunState) -> None:
        """Take the published model, or a newer one where the server keeps this one no more."""
        try:
            await self._take_global_model(state)
        except NotFoundError as error:
            number = state.latest_round
            state = await self._news.next(lambda newer: newer.latest_round > number or newer.run_over)
            if state.latest_round == number:
                await self._give_up(number, error)

    async def _go_on_with(self, arrived: Arrived) -> None:
        """Use a model that an earlier life of this agent has measured; it may be neither here nor there."""
        try:
            path = await self._download(arrived.weights, "global model")
        except NotFoundError as error:
            await self._give_up(arrived.report.round, error)
        else:
            await self._use_and_report(arrived, path)

    async def _give_up(self, number: int, error: NotFoundError) -> None:
        """Do without the model of a round."""
        self._display.message(f"round {number}: its model cannot be had any more: {error}")
        await self._save(evaluated_round=number, arrived=None)

    async def _take_global_model(self, state: RunState) -> None:
        """Download, compare on this agent's own held-out data, adapt if need be, apply, report."""
        self._metrics.set_phase(Phase.DOWNLOADING)
        path = await self._download(state.latest_weights, "global model", state.latest_encoded)
        self._metrics.set_phase(Phase.EVALUATING)
        trained = self._disk.progress.trained
        if trained and trained.round != state.latest_round:
            trained = None
        models = await self._models()
        number, adapting = state.latest_round, f"round {state.latest_round}: adapting"
        report = await self._training(adapting, models.measure, number, path, trained)
        arrived = Arrived(weights=state.latest_weights, report=report)
        # Once the model is replaced, the one before cannot be measured again.
        await self._save(arrived=arrived)
        crash_point(Point.AGENT_EVALUATED)
        await self._use_and_report(arrived, path)

    async def _use_and_report(self, arrived: Arrived, path: Path) -> None:
        report = arrived.report
        models = await self._models()
        await self._training(f"round {report.round}: adapting", models.apply, path, report)
        crash_point(Point.AGENT_MODEL_APPLIED)
        self._metrics.set_accuracies(
            local=report.accuracy_local,
            before=report.accuracy_before,
            after=report.accuracy_after,
            adapted=report.accuracy_adapted,
        )
        await self._client.report(report)
        crash_point(Point.AGENT_REPORTED)
        await self._save(evaluated_round=report.round, arrived=None)
        # Nothing in there is of a later round yet: that one starts from this model, applied or not.
        self._disk.discard_all_but({path})
        self._display.message(f"round {report.round}: {_outcome_of(report)}")
        self._metrics.set_phase(Phase.WAITING)

    # ------------------------------------------------------------------ transfers

    async def _download_initial(self, state: RunState) -> Path | None:
        """What this round's pre-training starts from; None: weights of this agent's own."""
        initial = self._initial_weights(state)
        return initial and await self._download(initial, "initial weights", state.initial_encoded)

    async def _download(self, blob: Blob, label: str, encoded: Encoded | None = None) -> Path:
        """The blob as a file; the same blob is fetched once."""
        path = self._disk.weights(blob.digest)
        is_here = blob == self._fetched and path.exists()
        if not is_here and not await asyncio.to_thread(_is_whole, path, blob):
            if not (encoded and await self._download_encoded(encoded, blob, label)):
                await self._fetch(blob, label)
            crash_point(Point.AGENT_DOWNLOADED)
        self._fetched = blob
        return path

    async def _download_encoded(self, encoded: Encoded, blob: Blob, label: str) -> bool:
        """Make the blob of a smaller one; False: that takes weights that are not here, or fails."""
        base = Base(self._disk.weights(encoded.base), encoded.base) if encoded.base else None
        if base and not base.path.exists():
            return False  # this agent has not been here when the round began
        try:
            path = await self._fetch(encoded.blob, label)
            await self._worker.run(_decode, path, base, blob, self._disk.weights(blob.digest))
        except (InvalidError, NotFoundError, RunError) as error:
            log.warning("downloaded_as_it_is", blob=blob.digest, reason=str(error))
            return False
        self._disk.discard(path)
        return True

    async def _fetch(self, blob: Blob, label: str) -> Path:
        """Download the blob; a server that is out of its mind shall not fill this device's disk."""
        most = await self._worker.run((await self._models()).most_weights_bytes)
        if not 0 < blob.size_bytes <= most:
            raise RunError(
                f"the server offers weights of {blob.size_bytes} bytes, and those of the run's model have"
                f" {most} at most: the server is not to be trusted, or the model another one there"
            )
        path, show = self._disk.weights(blob.digest), self._bar(f"download {label}")
        await self._worker.when_there_is_room(lambda: self._client.download(blob, path, show))
        return path

    async def _upload(self, path: Path, blob: Blob, kind: Kind, on_bytes: OnBytes) -> None:
        await self._client.upload(path, blob, kind, on_bytes)
        crash_point(Point.AGENT_UPLOADED)

    async def _upload_shards(self) -> None:
        """Those that the server does not have yet: it is asked for each."""
        shards, bar = (await self._models()).shards, self._bar("upload data")
        before, total = 0, sum(blob.size_bytes for blob in shards.values())

        def show(done: int, _: int) -> None:
            bar(before + done, total)

        for path, blob in shards.items():
            await self._upload(path, blob, "data", show)
            before += blob.size_bytes

    def _bar(self, label: str) -> OnBytes:
        return lambda done, total: self._display.update(label, done, total)

    # ------------------------------------------------------------------ what runs in a thread

    async def _load(self) -> LocalModels:
        local = await self._worker.run(self._load_data)
        crash_point(Point.AGENT_DATA_LOADED)
        self._display.message(_what_is_shared(local, self._joined.run.retain_data))
        if local.has_withdrawn and self._config.share_data != "all":
            self._display.message(
                "some images are no longer shared; where they were sent before, the server's operator deletes"
                f" them with `cloud-server forget {self._disk.agent_id}`"
            )
        return local

    async def _read_what_has_changed(self) -> None:
        """An image folder may be another by the time a round begins; while one lasts the data stay."""
        arguments = self._joined.run, self._config.data, self._config.data_dir
        try:
            if await self._worker.run(data_stamp, *arguments) == (await self._models()).stamp:
                return
            loaded = await self._load()
        except UsageError as error:
            self._display.message(f"the data cannot be read again, so those of before are used: {error}")
            return
        self._display.message(f"the data have changed: {loaded.num_examples} examples to train on")
        self._loading = asyncio.get_running_loop().create_future()
        self._loading.set_result(loaded)

    async def _models(self) -> LocalModels:
        return await asyncio.shield(self._loading)

    def _load_data(self) -> LocalModels:
        return load_local_models(self._joined, self._config, self._disk, self._device)

    async def _training(self, label: str, function: Callable[..., _T], *args: Any) -> _T:
        """Call what trains: it shows how far it is, and stops soon after this is cancelled.

        Args:
            function: takes what to call at each step for its last argument.
        """
        is_left = threading.Event()

        def show(step: StepReport) -> None:
            if is_left.is_set():
                raise RunError("stopped while training")
            self._show_step(label, step)

        try:
            return await self._worker.run(function, *args, show)
        finally:
            is_left.set()  # a thread can only end by itself

    def _show_step(self, label: str, step: StepReport) -> None:
        self._metrics.pretrain_loss.set(step.loss)
        self._display.update(label, step.step, step.num_steps, f"loss {step.loss:.3f}")

    # ------------------------------------------------------------------ how it stands

    def is_ready(self) -> bool:
        """Whether the server has been reached."""
        return self._news.latest is not None

    async def status(self) -> dict[str, Any]:
        progress, latest = self._disk.progress, self._news.latest
        return {
            "agent_id": self._disk.agent_id,
            "run_id": progress.run_id,
            "round": latest.round if latest else None,
            "phase": latest.phase if latest else None,
            "contributed_round": progress.contributed_round,
            "evaluated_round": progress.evaluated_round,
            "accuracy_local": progress.trained.accuracy if progress.trained else None,
        }

    async def _follow(self) -> None:
        async for state in self._client.watch():
            if state.failed_round > self._shown_failure:
                self._shown_failure = state.failed_round
                self._display.message(f"round {state.failed_round} failed: {state.failure}")
            if state.left_out_round > self._shown_left_out:
                self._shown_left_out = number = state.left_out_round
                self._display.message(f"round {number}: contribution left out: {state.left_out}")
            if state.run_over:
                self._client.patience_seconds = LAST_SECONDS
            self._news.tell(state)

    async def _save(self, **changes: Any) -> None:
        await self._worker.run(self._disk.save, self._disk.progress.model_copy(update=changes))


def _what_is_shared(local: LocalModels, retain_data: str) -> str:
    if not local.num_shared:
        return f"no image leaves this device, {local.num_examples} are trained on"
    kept = {"round": "until their round is over", "run": "beyond their round"}[retain_data]
    return f"shared are {local.num_shared} of {local.num_examples} images, which the server keeps {kept}"


def _outcome_of(report: Report) -> str:
    if not report.applied:
        return f"kept its own model: {report.reason}"
    before = "none" if report.accuracy_before is None else f"{report.accuracy_before:.4f}"
    adapted = "" if report.accuracy_adapted is None else f", adapted {report.accuracy_adapted:.4f}"
    return f"accuracy before {before}, after {report.accuracy_after:.4f}{adapted}, applied"


def _decode(encoded: Path, base: Base | None, blob: Blob, target: Path) -> None:
    """Write `target`, the blob.

    Raises:
        InvalidError: it does not come out.
        RunError: the base is not usable.
    """
    decoded = target.with_name("decoded.safetensors")
    decode(encoded, decoded, base=base)
    crash_point(Point.AGENT_DECODED)
    if blob_of(decoded) != blob:
        raise InvalidError("decoding it gives other weights than the server's")
    decoded.replace(target)


def _is_whole(path: Path, blob: Blob) -> bool:
    return path.exists() and blob_of(path) == blob
