"""An agent whose run ends, whose server begins another run, or who is told to stop, does not hang on."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ecavg.common import rpc
from ecavg.common.config import RunConfig
from ecavg.common.dataset import CLASS_NAMES
from ecavg.common.errors import BudgetError, InvalidError, NotFoundError, Reason, UnavailableError, UsageError
from ecavg.common.run_state import Outcome, Phase, PublishedModel, RunState, Verdict, Wait
from ecavg.common.transfer import Blob
from ecavg.edge_agent import agent as agent_module
from ecavg.edge_agent.agent import EdgeAgent
from ecavg.edge_agent.client import Joined, UnknownAgentError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.local import load_local_models
from ecavg.edge_agent.member import MAX_SENDINGS, Member
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.state import AgentState, Arrived, Progress, Report
from tests.faults.test_agent_restart import RUN, Client, Cloud, Display, Power, run_state
from tests.processes import Cluster

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


async def test_run_that_ends_while_data_are_loaded_lets_the_agent_go(tmp_path: Path) -> None:
    started = Started(tmp_path)
    loading = started.load = Blocked(lambda _: None)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(loading.entered.wait, 30)
    started.send(over=True)
    await running
    loading.let_go()


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "accuracy_local"), ({"task": "regression", "dataset": "diabetes"}, "score_local")],
)
async def test_status_names_the_figure_of_the_task(
    tmp_path: Path, settings: dict[str, str], name: str
) -> None:
    started = Started(tmp_path)
    started.client.run = RunConfig(**settings)
    loading = started.load = Blocked(lambda _: None)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(loading.entered.wait, 30)
    assert {key for key in await started.agent.status() if key.endswith("_local")} == {name}
    started.send(over=True)
    await running
    loading.let_go()


async def test_run_that_ends_while_the_agent_trains_lets_it_go(tmp_path: Path) -> None:
    started = Started(tmp_path)
    training = Blocked(lambda *_: None)

    def loaded(load: Callable[[], Any]) -> Any:
        local = load()
        local.pretrain = training  # type: ignore[method-assign]
        return local

    started.load = loaded
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    started.send(over=True)
    await running
    training.let_go()
    assert started.cloud.counts["contributions"] == 0


async def test_training_that_is_left_ends_at_its_next_step(tmp_path: Path) -> None:
    started = Started(tmp_path)
    stepped, resumed = threading.Event(), threading.Event()

    def show_step(*_: Any) -> None:
        stepped.set()
        assert resumed.wait(30)

    started.show_step = show_step
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(stepped.wait, 30)
    started.send(over=True)
    await running
    resumed.set()
    await asyncio.to_thread(started.agent._worker._thread.shutdown)
    assert not started.disk.local_weights.exists()


async def test_adapting_that_is_left_ends_at_its_next_step(tmp_path: Path) -> None:
    started = Started(tmp_path)
    stepped, resumed = threading.Event(), threading.Event()

    def show_step(label: str, _: Any) -> None:
        if label == "round 1: adapting":
            stepped.set()
            assert resumed.wait(30)

    save, loop = started.disk.save, asyncio.get_running_loop()

    def then_publish(progress: Any) -> None:
        save(progress)
        if progress.contributed_round > 0:  # the model is worse than what was pre-trained
            loop.call_soon_threadsafe(lambda: started.send(latest=1, phase="published"))

    started.show_step = show_step
    started.disk.save = then_publish  # type: ignore[method-assign]
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(stepped.wait, 30)
    running.cancel()
    await asyncio.wait((running,))
    resumed.set()
    await asyncio.to_thread(started.agent._worker._thread.shutdown)
    assert not started.disk.adapted.exists()


async def test_last_model_is_taken_when_the_run_ended_while_data_were_loaded(tmp_path: Path) -> None:
    started = Started(tmp_path)
    loading = started.load = Blocked(lambda load: load())
    started.send(latest=1, over=True)
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(loading.entered.wait, 30)
    loading.let_go()
    await running
    assert started.disk.model.read_bytes() == started.cloud.files[1].read_bytes()
    assert [report.round for report in started.cloud.reports] == [1]


class Deserted(Steered):
    """Nobody is there any more when the report is due."""

    patience_seconds = float("inf")

    async def report(self, report: Report) -> None:
        assert self.patience_seconds < 100  # or it would be tried for ever
        raise UnavailableError("gone")


async def test_server_that_is_gone_before_the_last_report_is_not_waited_for(tmp_path: Path) -> None:
    started = Started(tmp_path, Deserted)
    started.send(latest=1, over=True)
    await started.run()
    assert started.disk.model.read_bytes() == started.cloud.files[1].read_bytes()
    assert any("the server was gone" in text for text in started.said)


class Empty(Steered):
    async def download(self, blob: Blob, path: Path, on_bytes: Any) -> None:
        raise NotFoundError("no such blob")


async def test_last_model_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    started = Started(tmp_path, Empty)
    started.send(latest=1)
    started.send(latest=1, over=True, phase="published")
    await started.run()
    assert any("cannot be had any more" in text for text in started.said)


class Retired(Steered):
    """Keeps the latest model only."""

    async def download(self, blob: Blob, path: Path, on_bytes: Any) -> None:
        if blob not in (self._cloud.initial, self._cloud.published):
            raise NotFoundError("no such blob")
        await super().download(blob, path, on_bytes)


async def test_measured_model_that_is_lost_here_and_retired_there_is_given_up(tmp_path: Path) -> None:
    started = Started(tmp_path, Retired)
    report = Report(
        round=1, score_local=None, score_before=None, score_after=0.5, num_held_out=1, applied=True,
        reason="",
    )  # fmt: skip
    lost = Arrived(weights=Blob("ab" * 32, started.cloud.published.size_bytes), report=report)
    started.disk.save(Progress(run_id="run", arrived=lost))
    started.send(latest=2, over=True)
    await started.run()
    assert "round 1: its model cannot be had any more: no such blob" in started.said
    progress = started.disk.progress
    assert (progress.arrived, progress.evaluated_round) == (None, 2)
    assert [report.round for report in started.cloud.reports] == [2]


async def test_server_that_begins_another_run_is_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)
    started = Started(tmp_path)
    started.client.run_ids = ["one", "two"]
    started.send(phase="published")
    started.client.states.put_nowait(UnknownAgentError("who?"))
    started.send(latest=1, over=True)
    await started.run()
    assert started.client.num_joins == 2
    assert (started.disk.progress.run_id, started.disk.progress.evaluated_round) == ("two", 1)
    # Nothing of a round is told, because none has failed or has left this agent out.
    assert not [text for text in started.said if text.startswith("round 0")]


async def test_agent_that_is_not_known_at_its_upload_joins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)
    started = Started(tmp_path)
    started.client.run_ids = ["one", "two"]
    join = started.client.join

    async def refuse(*args: Any) -> None:
        raise UnknownAgentError("who?")

    async def join_and_hear(class_names: Sequence[str]) -> Joined:
        joined = await join(class_names)
        started.send(over=started.client.num_joins == 2)
        return joined

    monkeypatch.setattr(started.client, "upload", refuse)
    monkeypatch.setattr(started.client, "join", join_and_hear)
    await started.run()
    assert (started.client.num_joins, started.disk.progress.run_id) == (2, "two")


class Overdrawn(Steered):
    """Takes nothing more in this round, and keeps no record of it."""

    async def contribute(self, number: int, **contribution: Any) -> Verdict:
        self._cloud.counts["refusals"] += 1
        raise BudgetError("go on in the next round")


async def test_contribution_that_the_server_has_nothing_of_is_made_again_once_the_agent_has_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)
    started = Started(tmp_path, Overdrawn)
    is_called_for = Member._is_called_for

    def forget() -> None:
        started.client.states.put_nowait(UnknownAgentError("who?"))
        started.send()

    events = iter((started.send, forget, started.send, lambda: started.send(over=True)))

    def then_go_on(member: Member, state: RunState) -> bool:
        """Send the next event when the agent has nothing to do."""
        is_idle = member._data.is_ready and not is_called_for(member, state)
        if is_idle:
            next(events)()
        return is_called_for(member, state)

    monkeypatch.setattr(Member, "_is_called_for", then_go_on)
    started.send()
    await started.run()
    assert (started.client.num_joins, started.cloud.counts["refusals"]) == (2, 2)


class Forgetful(Steered):
    """Has lost what was uploaded; more than once."""

    num_uploads = 0
    num_losses = 2

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self.num_uploads += 1

    async def contribute(self, number: int, **contribution: Any) -> Verdict:
        if self.num_uploads <= 2 * self.num_losses:
            raise NotFoundError("not uploaded", Reason.MISSING_BLOB)
        return await super().contribute(number, **contribution)


@pytest.mark.parametrize("num_losses", [2, 99])
async def test_blobs_that_the_server_lost_are_uploaded_again(
    tmp_path: Path, num_losses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(tmp_path, Forgetful)
    monkeypatch.setattr(started.client, "num_losses", num_losses)
    end_when_contributed(started)
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == (num_losses < MAX_SENDINGS)
    assert started.client.num_uploads == 2 * MAX_SENDINGS  # type: ignore[attr-defined]


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
    training = Blocked(lambda *_: None)

    def loaded(load: Callable[[], Any]) -> Any:
        local = load()
        training._then = local.pretrain
        local.pretrain = training  # type: ignore[method-assign]
        return local

    started.load = loaded
    return training


def end_when_contributed(started: Started) -> None:
    save, loop = started.disk.save, asyncio.get_running_loop()

    def then_end(progress: Any) -> None:
        save(progress)
        if progress.contributed_round > 0:
            loop.call_soon_threadsafe(lambda: started.send(over=True))

    started.disk.save = then_end  # type: ignore[method-assign]


def when_saved(started: Started, is_awaited: Callable[[Progress], object]) -> asyncio.Event:
    """Return an event that comes when the progress on disk is the awaited one."""
    saved, save, loop = asyncio.Event(), started.disk.save, asyncio.get_running_loop()

    def then_tell(progress: Progress) -> None:
        save(progress)
        if is_awaited(progress):
            loop.call_soon_threadsafe(saved.set)

    started.disk.save = then_tell  # type: ignore[method-assign]
    return saved


async def test_data_travel_while_the_agent_trains(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    training = train_blocked(started)
    end_when_contributed(started)
    client.let_through.set()
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    await asyncio.wait_for(client.data_came.wait(), 30)
    assert client.uploaded == ["data"]
    training.let_go()
    await running
    assert client.uploaded == ["data", "weights"]
    assert started.cloud.counts["contributions"] == 1


async def test_data_that_take_longer_than_the_training_are_waited_for(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    trained = when_saved(started, lambda progress: progress.trained)
    end_when_contributed(started)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.wait_for(trained.wait(), 30)
    assert started.cloud.counts["contributions"] == 0
    client.let_through.set()
    await running
    assert client.uploaded == ["data", "weights"]


class OutsideOfHours(Sluggish):
    """Uploads of data wait for hours that never come."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(cloud)
        self.gave_up = asyncio.Event()

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self.upload_waits = True
        try:
            await super().upload(path, blob, kind, on_bytes)
        finally:
            self.upload_waits = False
            self.gave_up.set()


@pytest.mark.parametrize("is_trained_first", [False, True])
async def test_model_is_taken_where_the_round_closes_outside_of_upload_hours(
    tmp_path: Path, is_trained_first: bool
) -> None:
    started = Started(tmp_path, OutsideOfHours)
    client: Any = started.client
    training, trained = train_blocked(started), when_saved(started, lambda progress: progress.trained)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    await asyncio.wait_for(client.data_came.wait(), 30)
    if is_trained_first:
        training.let_go()
        await asyncio.wait_for(trained.wait(), 30)
        started.send(phase="aggregating")
    else:
        # What has begun is finished.
        started.send(phase="aggregating")
        training.let_go()
    await asyncio.wait_for(client.gave_up.wait(), 30)
    evaluated = when_saved(started, lambda progress: progress.evaluated_round == 1)
    started.send(latest=1, phase="aggregating")
    await asyncio.wait_for(evaluated.wait(), 30)
    started.send(latest=1, over=True)
    await running
    assert "round 1 has closed: what was trained for it is not uploaded" in started.said
    assert (client.uploaded, started.cloud.counts["contributions"]) == ([], 0)
    progress = started.disk.progress
    assert progress.trained
    assert (progress.trained.round, progress.evaluated_round) == (1, 1)


async def test_refused_data_are_told_after_the_training_and_not_sent_again(tmp_path: Path) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    client.refusal = InvalidError("not a shard of the run's dataset", Reason.INVALID_SHARD)
    client.let_through.set()
    end_when_contributed(started)
    started.send()
    await started.run()
    assert client.uploaded == []
    assert started.cloud.counts["contributions"] == 0
    assert "round 1: contribution rejected: not a shard of the run's dataset" in started.said
    progress = started.disk.progress
    assert (progress.contributed_round, progress.trained is not None) == (1, True)
    assert started.disk.model.exists()


async def test_data_that_cannot_be_read_again_are_used_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> str:
        raise UsageError("no class folders in photos/train")

    monkeypatch.setattr("ecavg.edge_agent.local_data.data_stamp", gone)
    started = Started(tmp_path)
    started.disk.save(Progress(run_id="run", num_taken=7))
    end_when_contributed(started)
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == 1
    # What has come since is new until it can be read.
    assert started.disk.progress.num_contributed == 7
    assert started.disk.progress.num_contributed_before == 0
    assert any("those of before are used: no class folders" in text for text in started.said)


@pytest.mark.parametrize(
    ("phase", "outcome", "num_contributed"),
    [
        ("failed", Outcome.ACCEPTED, 2),
        # This device had no part in the round that failed.
        ("failed", None, 7),
        ("fine_tuning", Outcome.ACCEPTED, 7),
    ],
)
async def test_examples_of_a_round_that_failed_are_new_again(
    tmp_path: Path, phase: str, outcome: Outcome | None, num_contributed: int
) -> None:
    started = Started(tmp_path)
    started.disk.save(
        Progress(run_id="run", contributed_round=1, num_contributed=7, num_contributed_before=2)
    )
    started.send(phase=phase, outcome=outcome)
    started.send(phase=phase, outcome=outcome, over=True)
    await started.run()
    assert started.disk.progress.num_contributed == num_contributed


async def test_data_that_have_changed_are_read_again_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.edge_agent.local_data.data_stamp", lambda *_: "another")
    started = Started(tmp_path)
    loaded, trained = [], []

    def count(load: Callable[[], Any]) -> Any:
        models = load()
        loaded.append(models)
        pretrain = models.pretrain

        def then_pretrain(*args: Any, **kwargs: Any) -> Any:
            trained.append(models)
            return pretrain(*args, **kwargs)

        models.pretrain = then_pretrain
        return models

    started.load = count
    end_when_contributed(started)
    started.send()
    await started.run()
    assert len(loaded) == 2
    assert trained == [loaded[1]]


async def test_agent_that_has_contributed_at_its_time_waits_for_the_next(tmp_path: Path) -> None:
    # On New Year's Day; two years have gone by since the last contribution.
    started = Started(tmp_path, pretrain_at="0 0 1 1 *")
    long_ago = time.time() - 2 * 365 * 86_400
    started.disk.save(Progress(run_id="run", waits_since=long_ago, num_taken=7))
    say_ready = started.client.say_ready

    def then_end(is_ready: bool, waits_for: Wait | None = None) -> None:
        say_ready(is_ready, waits_for)
        if waits_for:
            started.send(over=True)

    started.client.say_ready = then_end  # type: ignore[method-assign]
    started.send()
    await started.run()
    assert started.cloud.counts["contributions"] == 1
    assert started.client.waits == [None, None, Wait.TIME]
    assert any("not ready: pretrain_at is on " in text for text in started.said)
    assert started.disk.progress.waits_since == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("over", [True, False], ids=["run over", "stopped"])
async def test_data_on_their_way_do_not_keep_an_agent_that_leaves(tmp_path: Path, over: bool) -> None:
    started = Started(tmp_path, Sluggish)
    client: Any = started.client
    training = train_blocked(started)
    started.send()
    running = asyncio.create_task(started.run())
    await asyncio.to_thread(training.entered.wait, 30)
    await asyncio.wait_for(client.data_came.wait(), 30)
    started.send(over=True) if over else running.cancel()
    await asyncio.wait((running,), timeout=30)
    assert running.done()
    assert client.num_cancelled == 1
    training.let_go()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_an_agent_that_trains_and_one_that_loads(
    cluster: Cluster, number: signal.Signals
) -> None:
    cluster.server("--min-agents", 2, "--set", "run.pretrain.epochs=100000")
    trains = cluster.agent("edge-1", "--partition", "1/2")
    loads = cluster.agent("edge-2", "--data", "tests.faults.sources:endless")
    loads.wait_for("endless data source")
    trains.wait_for("round 1: pre-training")
    for agent in (trains, loads):
        agent.process.send_signal(number)  # by itself, neither would ever end
        assert agent.wait() == 0
        assert "Traceback" not in agent.output
    # The lock was kept until the process was gone, and is free now.
    AgentState(cluster.folder / "edge-1", "edge-1").close()
