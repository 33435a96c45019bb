"""The life of an agent: pre-train, upload, contribute, wait, take the global model, report.

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

from common.errors import ConflictError, NotFoundError, Refusal, RunError
from common.faults import Point, crash_point
from common.telemetry import ProgressDisplay
from common.training import StepReport, select_device
from common.transfer import Blob, blob_of
from edge_agent.client import CloudClient, Joined, Kind, RunState
from edge_agent.config import AgentConfig
from edge_agent.data import load_agent_data
from edge_agent.local import LocalModels
from edge_agent.metrics import AgentMetrics, Phase
from edge_agent.partition import Partition, parse_partition
from edge_agent.state import AgentState, Arrived, Progress, Trained

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
        self._stopping = threading.Event()
        self._latest: RunState | None = None
        self._news = asyncio.Event()
        self._shown_failure = 0
        self._joined: Joined  # set by run()
        self._local: LocalModels

    async def run(self) -> None:
        """Take part in every round until the server says that the run is over.

        Raises:
            UsageError: the data or the run's model cannot be used on this device.
        """
        self._metrics.set_phase(Phase.CONNECTING)
        self._joined = await self._client.join()
        if self._joined.run_id != self._disk.progress.run_id:
            self._disk.save(Progress(run_id=self._joined.run_id))
            self._disk.discard_all_but(())
        crash_point(Point.AGENT_JOINED)
        self._display.message(
            f"joined as {self._disk.agent_id}, slot {self._joined.slot}:"
            f" {self._joined.run.model} on {self._joined.run.dataset}"
        )
        self._local = await self._in_thread(self._load_data)
        crash_point(Point.AGENT_DATA_LOADED)
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._follow())
                await self._take_part()
                watching.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        self._metrics.set_phase(Phase.DONE)

    async def _take_part(self) -> None:
        if arrived := self._disk.progress.arrived:
            path = await self._download(arrived.weights, "global model")
            await self._use_and_report(arrived, path)
        while True:
            state = await self._next_state(self._is_called_for)
            if self._is_new_model(state):
                await self._take_latest_model(state)
            elif self._is_open_round(state):
                await self._contribute(state)
            else:
                return

    def _is_called_for(self, state: RunState) -> bool:
        return state.run_over or self._is_new_model(state) or self._is_open_round(state)

    def _is_new_model(self, state: RunState) -> bool:
        return state.latest_round > self._disk.progress.evaluated_round

    def _is_open_round(self, state: RunState) -> bool:
        is_new = state.round > self._disk.progress.contributed_round
        return state.phase == "collecting" and is_new and not state.run_over

    # ------------------------------------------------------------------ what a round asks of an agent

    async def _contribute(self, state: RunState) -> None:
        """Pre-train on this agent's shard, upload weights and data, and commit them."""
        if state.outcome == "accepted":  # in an earlier life, which ended before it heard of it
            outcome, message = state.outcome, ""
        else:
            trained = await self._pretrain(state)
            self._metrics.set_phase(Phase.UPLOADING)
            outcome, message = await self._send(trained)
            crash_point(Point.AGENT_CONTRIBUTED)
        log.info("contributed", round=state.round, outcome=outcome, reason=message or None)
        if outcome != "accepted":
            self._display.message(f"round {state.round}: contribution {outcome}: {message}")
        self._save(contributed_round=state.round)
        crash_point(Point.AGENT_CONTRIBUTION_SAVED)
        self._disk.discard(self._disk.local_weights, self._disk.checkpoint)
        self._metrics.set_phase(Phase.WAITING)

    async def _pretrain(self, state: RunState) -> Trained:
        """This round's weights, which an earlier life of this agent may have trained."""
        self._metrics.set_phase(Phase.PRE_TRAINING)
        trained = self._disk.progress.trained
        if not trained or not await self._in_thread(self._is_kept, trained, state.round):
            initial = await self._initial_weights(state)
            trained = await self._in_thread(
                self._local.pretrain, state.round, initial, lambda step: self._show_step(state.round, step)
            )
            crash_point(Point.AGENT_WEIGHTS_WRITTEN)
            self._save(trained=trained)
            crash_point(Point.AGENT_PRETRAINED)
            self._disk.discard(self._disk.checkpoint)
        self._display.message(f"round {state.round}: local accuracy {trained.accuracy:.4f}")
        self._metrics.accuracy_ratio.labels("local").set(trained.accuracy)
        return trained

    def _is_kept(self, trained: Trained, number: int) -> bool:
        return trained.round == number and _is_whole(self._disk.local_weights, trained.weights)

    async def _initial_weights(self, state: RunState) -> Path | None:
        """Where this round's pre-training starts; None: from weights of this agent's own."""
        if self._joined.run.initial_weights == "independent" and state.latest_round == 0:
            return None
        return await self._download(state.initial_weights, "initial weights")

    async def _send(self, trained: Trained) -> tuple[str, str]:
        """Upload and commit; the outcome, and why."""
        try:
            shard = await self._upload_shard()
            await self._upload(self._disk.local_weights, trained.weights, "weights")
            return await self._client.contribute(
                trained.round,
                weights=trained.weights,
                shards=[shard],
                num_examples=self._local.num_examples,
                accuracy_local=trained.accuracy,
            )
        except ConflictError as error:
            return "accepted", str(error)  # an earlier life of this agent has contributed
        except Refusal as error:
            return "rejected", str(error)

    async def _take_latest_model(self, state: RunState) -> None:
        """Take the published model, or a newer one where the server keeps this one no more."""
        try:
            await self._take_global_model(state)
        except NotFoundError:
            await self._next_state(lambda newer: newer.latest_round > state.latest_round)

    async def _take_global_model(self, state: RunState) -> None:
        """Download, compare on this agent's own held-out data, apply, report."""
        self._metrics.set_phase(Phase.DOWNLOADING)
        path = await self._download(state.latest_weights, "global model")
        self._metrics.set_phase(Phase.EVALUATING)
        trained = self._disk.progress.trained
        local = trained.accuracy if trained and trained.round == state.latest_round else None
        report = await self._in_thread(self._local.measure, state.latest_round, path, local)
        arrived = Arrived(weights=state.latest_weights, report=report)
        self._save(arrived=arrived)  # once the model is replaced, the one before cannot be measured again
        crash_point(Point.AGENT_EVALUATED)
        await self._use_and_report(arrived, path)

    async def _use_and_report(self, arrived: Arrived, path: Path) -> None:
        report = arrived.report
        await self._in_thread(self._local.apply, path, report)
        crash_point(Point.AGENT_MODEL_APPLIED)
        self._metrics.accuracy_ratio.labels("after").set(report.accuracy_after)
        if report.accuracy_before is not None:
            self._metrics.accuracy_ratio.labels("before").set(report.accuracy_before)
        await self._client.report(report)
        crash_point(Point.AGENT_REPORTED)
        self._save(evaluated_round=report.round, arrived=None)
        # Nothing in there is of a later round yet: that one starts from this model.
        self._disk.discard_all_but({self._disk.shard, path})
        before = "none" if report.accuracy_before is None else f"{report.accuracy_before:.4f}"
        self._display.message(
            f"round {report.round}: accuracy before {before}, after {report.accuracy_after:.4f},"
            f" {'applied' if report.applied else f'not applied: {report.reason}'}"
        )
        self._metrics.set_phase(Phase.WAITING)

    # ------------------------------------------------------------------ transfers

    async def _download(self, blob: Blob, label: str) -> Path:
        """The blob as a file; the same blob is fetched once."""
        path = self._disk.weights(blob)
        if not await self._in_thread(_is_whole, path, blob):
            await self._client.download(blob, path, self._bar(f"download {label}"))
            crash_point(Point.AGENT_DOWNLOADED)
        return path

    async def _upload(self, path: Path, blob: Blob, kind: Kind) -> None:
        await self._client.upload(path, blob, kind, self._bar(f"upload {kind}"))
        crash_point(Point.AGENT_UPLOADED)

    async def _upload_shard(self) -> Blob:
        blob = await self._in_thread(self._local.write_shard)
        await self._upload(self._disk.shard, blob, "data")
        return blob

    def _bar(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: self._display.update(label, done, total)

    # ------------------------------------------------------------------ what runs in a thread

    def _load_data(self) -> LocalModels:
        run = self._joined.run
        data = load_agent_data(
            run,
            source=self._config.data,
            data_dir=self._config.data_dir,
            partition=self._partition(),
            seed_name=self._disk.agent_id,
            # Naming code with --data is leave to run it.
            allowed_factories={*self._config.allow_factory, self._config.data or ""},
        )
        return LocalModels(
            run,
            data,
            self._disk,
            self._device,
            self._config.allow_factory,
            self._config.checkpoint_seconds,
        )

    def _partition(self) -> Partition | None:
        """Asked for, or the server's slot where agents share the run's dataset."""
        if self._config.partition:
            return parse_partition(self._config.partition)
        if self._config.data:
            return None
        slot, count = self._joined.slot, self._joined.num_partitions
        if slot > count:
            log.warning("partition_shared", slot=slot, num_partitions=count)
        return Partition((slot - 1) % count + 1, count)

    def _show_step(self, number: int, step: StepReport) -> None:
        if self._stopping.is_set():
            raise RunError("stopped while pre-training")
        self._metrics.pretrain_loss.set(step.loss)
        label = f"round {number}: pre-training"
        self._display.update(label, step.step, step.num_steps, f"loss {step.loss:.3f}")

    async def _in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """Run what blocks, and have it stop soon when this agent is stopped."""
        try:
            return await asyncio.to_thread(function, *args)
        except asyncio.CancelledError:
            self._stopping.set()
            raise

    # ------------------------------------------------------------------ how it stands

    def is_ready(self) -> bool:
        """Whether the server has been reached."""
        return self._latest is not None

    def status(self) -> dict[str, Any]:
        progress = self._disk.progress
        return {
            "agent_id": self._disk.agent_id,
            "run_id": progress.run_id,
            "round": self._latest.round if self._latest else None,
            "phase": self._latest.phase if self._latest else None,
            "contributed_round": progress.contributed_round,
            "evaluated_round": progress.evaluated_round,
            "accuracy_local": progress.trained.accuracy if progress.trained else None,
        }

    async def _follow(self) -> None:
        async for state in self._client.watch():
            self._latest = state
            if state.failed_round > self._shown_failure:
                self._shown_failure = state.failed_round
                self._display.message(f"round {state.failed_round} failed: {state.failure}")
            self._news.set()
            self._news = asyncio.Event()

    async def _next_state(self, is_awaited: Callable[[RunState], bool]) -> RunState:
        while True:
            news = self._news
            if self._latest and is_awaited(self._latest):
                return self._latest
            await news.wait()

    def _save(self, **changes: Any) -> None:
        self._disk.save(self._disk.progress.model_copy(update=changes))


def _is_whole(path: Path, blob: Blob) -> bool:
    return path.exists() and blob_of(path) == blob
