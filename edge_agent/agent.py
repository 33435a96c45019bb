"""The life of an agent: pre-train, upload, contribute, wait, take the global model, report.

The agent acts on what the run's latest state says is left for it to do, so it makes no difference
whether it has been here all along, has lost its connection, or has just been started again.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog
import torch
from torch import nn

from common import training
from common.errors import ConflictError, Refusal, RunError
from common.files import replacing
from common.models import build_model
from common.shards import Shard, write_shard
from common.telemetry import ProgressDisplay
from common.training import StepReport, derive_seed
from common.transfer import Blob, blob_of
from common.weights import load_into, write_state_dict
from edge_agent.client import CloudClient, Joined, Kind, Report, RunState
from edge_agent.config import AgentConfig
from edge_agent.data import AgentData, load_agent_data
from edge_agent.metrics import AgentMetrics, Phase
from edge_agent.partition import Partition, parse_partition
from edge_agent.state import AgentState, Progress

_T = TypeVar("_T")

log = structlog.get_logger()


class LocalModel(NamedTuple):
    """This agent's pre-trained weights."""

    path: Path
    blob: Blob
    accuracy: float  # on the held-out data


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
        self._device = training.select_device(config.device)
        self._stopping = threading.Event()
        self._latest: RunState | None = None
        self._news = asyncio.Event()
        self._shown_failure = 0
        self._joined: Joined  # set by run()
        self._data: AgentData

    async def run(self) -> None:
        """Take part in every round until the server says that the run is over.

        Raises:
            UsageError: the data or the run's model cannot be used on this device.
        """
        self._metrics.set_phase(Phase.CONNECTING)
        self._joined = await self._client.join()
        if self._joined.run_id != self._disk.progress.run_id:
            self._disk.save(Progress(run_id=self._joined.run_id))
        self._display.message(
            f"joined as {self._disk.agent_id}, slot {self._joined.slot}:"
            f" {self._joined.run.model} on {self._joined.run.dataset}"
        )
        self._data = await self._in_thread(self._load_data)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._follow())
            await self._take_part()
            watching.cancel()
        self._metrics.set_phase(Phase.DONE)

    async def _take_part(self) -> None:
        while True:
            state = await self._next_state(self._is_called_for)
            if self._is_new_model(state):
                await self._take_global_model(state)
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
        local = await self._pretrain(state)
        self._metrics.set_phase(Phase.UPLOADING)
        try:
            shard = await self._upload_shard()
            await self._upload(local.path, local.blob, "weights")
            verdict = await self._client.contribute(
                state.round,
                weights=local.blob,
                shards=[shard],
                num_examples=len(self._data.train.labels),
                accuracy_local=local.accuracy,
            )
            outcome, message = verdict
        except ConflictError as error:
            outcome, message = "accepted", str(error)  # an earlier life of this agent has contributed
        except Refusal as error:
            outcome, message = "rejected", str(error)
        log.info("contributed", round=state.round, outcome=outcome, reason=message or None)
        if outcome != "accepted":
            self._display.message(f"round {state.round}: contribution {outcome}: {message}")
        self._save(contributed_round=state.round, accuracy_local=local.accuracy)
        self._metrics.set_phase(Phase.WAITING)

    async def _pretrain(self, state: RunState) -> LocalModel:
        self._metrics.set_phase(Phase.PRE_TRAINING)
        initial = await self._initial_weights(state)
        local = await self._in_thread(self._pretrain_now, state.round, initial)
        self._display.message(f"round {state.round}: local accuracy {local.accuracy:.4f}")
        self._metrics.accuracy_ratio.labels("local").set(local.accuracy)
        return local

    async def _initial_weights(self, state: RunState) -> Path | None:
        """Where this round's pre-training starts; None: from weights of this agent's own."""
        if self._joined.run.initial_weights == "independent" and state.latest_round == 0:
            return None
        return await self._download(state.initial_weights, "initial weights")

    async def _take_global_model(self, state: RunState) -> None:
        """Download, compare on this agent's own held-out data, apply, report."""
        self._metrics.set_phase(Phase.DOWNLOADING)
        path = await self._download(state.latest_weights, "global model")
        self._metrics.set_phase(Phase.EVALUATING)
        report = await self._in_thread(self._evaluate_and_apply, state.latest_round, path)
        await self._client.report(report)
        self._save(evaluated_round=state.latest_round)
        before = "none" if report.accuracy_before is None else f"{report.accuracy_before:.4f}"
        self._display.message(
            f"round {report.round}: accuracy before {before}, after {report.accuracy_after:.4f},"
            f" {'applied' if report.applied else f'not applied: {report.reason}'}"
        )
        self._metrics.set_phase(Phase.WAITING)

    # ------------------------------------------------------------------ transfers

    async def _download(self, blob: Blob, label: str) -> Path:
        """The blob as a file; the same blob is fetched once."""
        path = self._disk.work / f"{blob.digest}.safetensors"
        if not path.exists():
            await self._client.download(blob, path, self._bar(f"download {label}"))
        return path

    async def _upload(self, path: Path, blob: Blob, kind: Kind) -> None:
        await self._client.upload(path, blob, kind, self._bar(f"upload {kind}"))

    async def _upload_shard(self) -> Blob:
        path = self._disk.work / "shard.safetensors"
        blob = await self._in_thread(_write_once, path, self._data.train)
        await self._upload(path, blob, "data")
        return blob

    def _bar(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: self._display.update(label, done, total)

    # ------------------------------------------------------------------ training, in a thread

    def _load_data(self) -> AgentData:
        joined = self._joined
        return load_agent_data(
            joined.run,
            source=self._config.data,
            data_dir=self._config.data_dir,
            partition=self._partition(),
            seed_name=self._disk.agent_id,
            # Naming code with --data is leave to run it.
            allowed_factories={*self._config.allow_factory, self._config.data or ""},
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

    def _pretrain_now(self, number: int, initial: Path | None) -> LocalModel:
        run, data = self._joined.run, self._data.train
        model = self._model(initial)
        training.train(
            model,
            torch.from_numpy(data.images),
            torch.from_numpy(data.labels),
            run.pretrain,
            spec=run.spec,
            device=self._device,
            seed=derive_seed(run.seed, "pretrain", number, self._disk.agent_id),
            on_step=lambda step: self._show_step(number, step),
        )
        accuracy = self._accuracy(model)
        path = self._disk.work / "local.safetensors"
        write_state_dict(model.state_dict(), path)
        if not self._disk.model.exists() or accuracy >= self._accuracy_of(self._disk.model):
            _copy(path, self._disk.model)
        return LocalModel(path, blob_of(path), accuracy)

    def _evaluate_and_apply(self, number: int, path: Path) -> Report:
        after = self._accuracy_of(path)
        before = self._accuracy_of(self._disk.model) if self._disk.model.exists() else None
        took_part = self._disk.progress.contributed_round == number
        report = Report(
            round=number,
            accuracy_local=self._disk.progress.accuracy_local if took_part else None,
            accuracy_before=before,
            accuracy_after=after,
            num_held_out=len(self._data.held_out.labels),
            applied=True,
            reason="",
        )
        _copy(path, self._disk.model)
        with replacing(self._disk.report) as partial:
            text = json.dumps({"agent_id": self._disk.agent_id, **report._asdict()}, indent=2)
            partial.write_text(text + "\n", "utf-8")
        self._metrics.accuracy_ratio.labels("after").set(after)
        if before is not None:
            self._metrics.accuracy_ratio.labels("before").set(before)
        return report

    def _model(self, weights: Path | None) -> nn.Module:
        run = self._joined.run
        model = build_model(
            run,
            seed=derive_seed(run.seed, "initial_weights", self._disk.agent_id),
            allowed_factories=self._config.allow_factory,
        )
        if weights:
            load_into(model, weights)
        return model

    def _accuracy_of(self, weights: Path) -> float:
        return self._accuracy(self._model(weights))

    def _accuracy(self, model: nn.Module) -> float:
        held_out = self._data.held_out
        return training.evaluate(
            model,
            torch.from_numpy(held_out.images),
            torch.from_numpy(held_out.labels),
            spec=self._joined.run.spec,
            device=self._device,
        ).accuracy

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
            "accuracy_local": progress.accuracy_local,
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


def _write_once(path: Path, shard: Shard) -> Blob:
    write_shard(path, shard)
    return blob_of(path)


def _copy(source: Path, target: Path) -> None:
    """A second, durable copy: the source may be replaced later."""
    with replacing(target) as partial, source.open("rb") as file, partial.open("wb") as copy:
        while piece := file.read(1 << 20):
            copy.write(piece)
