"""An agent that runs in this process, and whose states the test sends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.dataset import CLASS_NAMES
from ecavg.common.run_state import Outcome, Phase, PublishedModel, RunState
from ecavg.common.transfer import Blob
from ecavg.edge_agent import agent as agent_module
from ecavg.edge_agent.agent import EdgeAgent
from ecavg.edge_agent.client import Joined
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.local import load_local_models
from ecavg.edge_agent.member import Member
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.state import AgentState, Progress
from tests.faults.test_agent_restart import RUN, Client, Cloud, Display, Power, run_state

NO_BLOB = Blob("", 0)


class Steered(Client):
    """A connection whose states the test sends; all else the Cloud answers."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(cloud, Power(None))
        self.states: asyncio.Queue[RunState | Exception] = asyncio.Queue()
        self.run_ids = ["run"]
        # The classes are named already, so that the agent joins once.
        self.run = RUN.model_copy(update={"class_names": CLASS_NAMES["digits"]})
        self.num_joins = 0

    async def join(self, class_names: Sequence[str] = ()) -> Joined:
        self.num_joins += 1
        return Joined(self.run_ids[min(self.num_joins, len(self.run_ids)) - 1], self.run, 1, 1)

    async def watch(self) -> AsyncIterator[RunState]:
        while True:
            state = await self.states.get()
            if isinstance(state, Exception):
                raise state
            yield state
            if state.run_over:
                return


class Started:
    """An agent in this process, and its fakes."""

    def __init__(self, folder: Path, client_class: type[Steered] = Steered, **keys: Any) -> None:
        self.cloud = Cloud(folder / "cloud")
        self.client = client_class(self.cloud)
        self.disk = AgentState(folder / "agent", "edge-1")
        self.said: list[str] = []
        display = Display()
        display.message = self.said.append  # type: ignore[method-assign]
        config = AgentConfig(server="localhost:1", device="cpu", **keys)
        self.agent = EdgeAgent(config, self.disk, self.client, AgentMetrics(), display)  # type: ignore[arg-type]
        # Called in the place of the agent's own reading of its data, with that as its argument.
        self.load: Callable[[Callable[[], Any]], Any] | None = None
        # Called in the place of the progress display.
        self.show_step: Any = None

    def send(
        self,
        *,
        latest: int = 0,
        over: bool = False,
        phase: str = "collecting",
        outcome: Outcome | None = None,
        accepted_weights: str = "",
    ) -> None:
        weights = self.cloud.published if latest else NO_BLOB
        initial = self.cloud.initial
        state = run_state(
            latest + 1,
            initial,
            phase=Phase(phase),
            latest_model=PublishedModel(latest, weights, None) if latest else None,
            counted_round=latest,
            run_over=over,
            outcome=outcome,
            accepted_weights=accepted_weights,
        )
        self.client.states.put_nowait(state)

    async def run(self, seconds: float = 30) -> None:
        try:
            with pytest.MonkeyPatch.context() as patch:
                if self.load:
                    patch.setattr(agent_module, "load_local_models", self._load)
                if self.show_step:
                    patch.setattr(Member, "_show_step", lambda _, *step: self.show_step(*step))
                await asyncio.wait_for(self.agent.run(), seconds)
        finally:
            self.disk.close()

    def _load(self, *args: Any) -> Any:
        assert self.load
        return self.load(lambda: load_local_models(*args))


class Blocked:
    """Keeps a thread busy until it is let go."""

    def __init__(self, then: Callable[..., Any]) -> None:
        self.entered, self._release, self._then = threading.Event(), threading.Event(), then

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.entered.set()
        assert self._release.wait(30)
        return self._then(*args, **kwargs)

    def let_go(self) -> None:
        self._release.set()


class Sluggish(Steered):
    """Data take until they are let through, or are refused."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(cloud)
        self.data_came, self.let_through = asyncio.Event(), asyncio.Event()
        self.refusal: Exception | None = None
        self.uploaded: list[str] = []
        self.num_cancelled = 0

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        if kind == "data":
            self.data_came.set()
            try:
                await self.let_through.wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
            if self.refusal:
                raise self.refusal
        self.uploaded.append(kind)


def train_blocked(started: Started) -> Blocked:
    """Have the agent's pre-training wait until it is let go."""
    training = Blocked(lambda *_: None)

    def loaded(load: Callable[[], Any]) -> Any:
        local = load()
        training._then = local.pretrain
        local.pretrain = training  # type: ignore[method-assign]
        return local

    started.load = loaded
    return training


def on_saved(started: Started, is_awaited: Callable[[Progress], object], then: Callable[[], object]) -> None:
    """Call `then` whenever the progress on disk is the awaited one."""
    save, loop = started.disk.save, asyncio.get_running_loop()

    def save_and_look(progress: Progress) -> None:
        save(progress)
        if is_awaited(progress):
            loop.call_soon_threadsafe(then)

    started.disk.save = save_and_look  # type: ignore[method-assign]


def end_when_contributed(started: Started) -> None:
    """End the run as soon as the agent has contributed."""
    on_saved(started, lambda progress: progress.contributed_round > 0, lambda: started.send(over=True))


def when_saved(started: Started, is_awaited: Callable[[Progress], object]) -> asyncio.Event:
    """Return an event that comes when the progress on disk is the awaited one."""
    saved = asyncio.Event()
    on_saved(started, is_awaited, saved.set)
    return saved
