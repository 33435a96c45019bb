"""The agent: it joins the server's run, takes part in it, and starts over where the server has begun another.

The life of a round on the device is in member.py.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from ecavg.common import logs, rpc
from ecavg.common.agent_progress import Activity, AgentProgress, OnExamples
from ecavg.common.background import beside
from ecavg.common.devices import select_device
from ecavg.common.errors import Refusal
from ecavg.common.faults import Point, crash_point
from ecavg.common.progress import LongWork, ProgressDisplay
from ecavg.common.run_display import RunDisplay
from ecavg.common.run_state import Phase as RoundPhase
from ecavg.common.run_state import Selection, Wait
from ecavg.common.tasks import kind_of, published
from ecavg.edge_agent.async_member import AsyncMember
from ecavg.edge_agent.client import CloudClient, Joined, UnknownAgentError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.hours import parse_hours
from ecavg.edge_agent.local import load_local_models
from ecavg.edge_agent.local_data import LocalData
from ecavg.edge_agent.member import Member
from ecavg.edge_agent.metrics import AgentMetrics, Phase
from ecavg.edge_agent.new_examples import NewExamples
from ecavg.edge_agent.news import News
from ecavg.edge_agent.own_training import OwnTraining
from ecavg.edge_agent.readiness import Condition, Readiness, at_times, with_examples, within
from ecavg.edge_agent.sources import class_names_of
from ecavg.edge_agent.state import AgentState, Progress
from ecavg.edge_agent.teller import Teller
from ecavg.edge_agent.updating import Updates
from ecavg.edge_agent.worker import Worker

# When the run is over and a model is left to take, the server may be silent for so long.
LAST_SECONDS = 60.0

log = structlog.get_logger()


@dataclass
class _Shown:
    """What the user has been shown of the run, each thing once."""

    # The last round whose failure was shown; 0: none.
    failure: int = 0
    # The last round that left this agent's contribution out of its model, as was shown; 0: none.
    left_out: int = 0
    # The last round that this agent was shown not to be drawn for; -1: none, as round 0 is the warm-up.
    not_drawn: int = -1


class EdgeAgent:
    """One device, for as long as its process runs.

    Args:
        own_training: trains in the place of this project's loop.
    """

    def __init__(
        self,
        config: AgentConfig,
        state: AgentState,
        client: CloudClient,
        metrics: AgentMetrics,
        display: ProgressDisplay,
        own_training: OwnTraining | None = None,
    ) -> None:
        self._config = config
        self._own_training = own_training
        self._disk = state
        self._client = client
        self._metrics = metrics
        self._display = display
        self._device = select_device(config.device)
        self._worker = Worker(display.message)
        self._news = News()
        self._new_examples = NewExamples(config.countable_source, state)
        # An agent of an earlier version has not kept since when it waits.
        self._started_at = time.time()
        self._readiness = Readiness(
            config.ready_command,
            config.ready_seconds,
            display.message,
            self._tell_readiness,
            list(self._conditions()),
        )
        self._updates = Updates(config, state, self._worker, metrics, display.message)
        # The task of the run that was joined last.
        self._task = "classification"
        self._shown = _Shown()
        self._teller = Teller(client)
        self._cloud = RunDisplay(display, "cloud: ")

    async def run(self) -> None:
        """Take part in every round until the server says that the run is over.

        Raises:
            UsageError: the data or the run's model cannot be used on this device.
        """
        if not self._readiness.is_ready:
            self._client.say_ready(False)
        try:
            async with beside(self._readiness.keep_asking(), self._keep_telling_new_examples()):
                await self._take_part_in_runs()
        except Refusal as error:
            if not (self._news.is_over and rpc.is_retried(error)):
                raise
            self._display.message(f"the run ended, and the server was gone before the end of it: {error}")
        finally:
            self._worker.close()
            self._teller.close()
        self._metrics.set_phase(Phase.DONE)

    async def _take_part_in_runs(self) -> None:
        """Take part in the server's run, and in others that it begins instead, until one is over."""
        backoff = rpc.Backoff()
        while not self._news.is_over:
            try:
                await self._take_part(await self._join())
            except UnknownAgentError:
                self._display.message("the server has begun another run")
                await asyncio.sleep(backoff())

    def _conditions(self) -> Iterator[Condition]:
        """Yield what must hold for this device to be ready, as it is configured."""
        if hours := [parse_hours(text) for text in self._config.work_hours]:
            yield within(hours)
        if times := self._config.pretrain_times:
            yield at_times(times, lambda: self._disk.progress.waits_since or self._started_at)
        if number := self._config.min_new_examples:
            yield with_examples(number, self._new_examples.count_new)

    def _tell_readiness(self, waits_for: Wait | None) -> None:
        self._client.say_ready(waits_for is None, waits_for)
        self._news.ask_again()

    async def _keep_telling_new_examples(self) -> None:
        """Tell how many new examples there are, as long as the next round waits for them."""
        while True:
            await self._news.next(lambda state: state.num_examples_to_open is not None)
            self._client.say_new_examples(await self._new_examples.count_new())
            await asyncio.sleep(self._config.ready_seconds)

    def is_ready(self) -> bool:
        """Return True once the server has been reached."""
        return self._news.latest is not None

    async def status(self) -> dict[str, Any]:
        """Return the JSON behind the agent's status."""
        progress, latest = self._disk.progress, self._news.latest
        fields = {
            "agent_id": self._disk.agent_id,
            "run_id": progress.run_id,
            "round": latest.round if latest else None,
            "phase": latest.phase if latest else None,
            "selection": latest.selection if latest else None,
            "is_ready": self._readiness.is_ready,
            "waits_for": self._readiness.waits_for,
            "next_round_at": latest.next_round_at if latest else None,
            "contributed_round": max(0, progress.contributed_round),
            "evaluated_round": progress.evaluated_round,
            "score_local": progress.trained.score if progress.trained else None,
        }
        return published(kind_of(self._task), fields)

    async def _join(self) -> Joined:
        self._metrics.set_phase(Phase.CONNECTING)
        # The latest state may have been another run's.
        self._news.latest = None
        source = self._config.data, self._config.data_dir
        names_of = partial(class_names_of, *source, table=self._config.table)
        names = await self._worker.run(names_of)
        joined = await self._client.join(names)
        if not names:
            # Only the run says which dataset this agent reads, where its own configuration does not.
            names = await self._worker.run(names_of, joined.run)
            if not set(names) <= set(joined.run.class_names):
                joined = await self._client.join(names)
        if joined.run_id != self._disk.progress.run_id:
            self._disk.discard_residuals_but(self._disk.residual(0))
            self._disk.discard_rests_but(None)
            await self._worker.run(self._disk.save, Progress(run_id=joined.run_id, waits_since=time.time()))
            await self._readiness.look()
            self._disk.discard_all_but(())
            self._shown = _Shown()
        self._task = joined.run.task
        self._cloud.run = joined.run
        crash_point(Point.AGENT_JOINED)
        self._display.message(
            f"joined as {self._disk.agent_id}, slot {joined.slot}: {joined.run.model} on {joined.run.dataset}"
        )
        return joined

    async def _take_part(self, joined: Joined) -> None:
        """Be a member of the run until it is over."""
        try:
            async with asyncio.TaskGroup() as tasks:
                # The states are followed from now on, so that the agent hears of the run's end.
                tasks.create_task(self._follow())
                data = LocalData(
                    partial(
                        load_local_models,
                        joined,
                        self._config,
                        self._disk,
                        self._device,
                        self._showing(Activity.READING),
                        self._showing(Activity.EVALUATING),
                        self._own_training,
                    ),
                    joined.run,
                    self._config,
                    self._disk.agent_id,
                    self._worker,
                    self._display,
                    self._teller,
                    tasks,
                    on_ready=self._news.ask_again,
                )
                kind = AsyncMember if joined.run.mode == "async" else Member
                member = kind(
                    joined.run,
                    self._client,
                    disk=self._disk,
                    worker=self._worker,
                    data=data,
                    news=self._news,
                    readiness=self._readiness,
                    new_examples=self._new_examples,
                    updates=self._updates,
                    metrics=self._metrics,
                    display=self._display,
                    teller=self._teller,
                )
                await member.take_part()
                data.stop()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def _showing(self, activity: Activity) -> OnExamples:
        """Return what is called with the examples that are done; it shows and tells that."""
        show = LongWork(self._display, activity.value)

        def note(done: int, total: int) -> None:
            self._teller.note(AgentProgress(activity, done, total))
            show.update(done, total)

        return note

    async def _follow(self) -> None:
        """Pass on the run's states, and show what went wrong with a round."""
        async for state in self._client.watch():
            logs.bind(round=state.round)
            if state.failed_round > self._shown.failure:
                self._shown.failure = state.failed_round
                self._display.message(f"round {state.failed_round} failed: {state.failure}")
            if state.selection is Selection.NOT_DRAWN and state.round > self._shown.not_drawn:
                self._shown.not_drawn = state.round
                self._display.message(
                    f"not drawn for round {state.round}: waiting for the model"
                    if state.round
                    else "not drawn for the warm-up: waiting for round 1"
                )
            if state.left_out and state.left_out.round > self._shown.left_out:
                self._shown.left_out = number = state.left_out.round
                self._display.message(f"round {number}: contribution left out: {state.left_out.message}")
            if state.run_over:
                self._client.patience_seconds = LAST_SECONDS
            if state.outcome or state.phase is not RoundPhase.COLLECTING:
                # Before, this agent has work of its own to show.
                self._cloud.show(state)
            self._news.tell(state)
