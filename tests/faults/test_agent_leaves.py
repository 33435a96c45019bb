"""An agent whose run ends, whose server begins another run, or who is told to stop, does not hang on."""

import asyncio
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ecavg.common import rpc
from ecavg.common.config import RunConfig
from ecavg.common.errors import BudgetError, NotFoundError, UnavailableError
from ecavg.common.run_state import RunState, Verdict
from ecavg.common.transfer import Blob
from ecavg.edge_agent.client import Joined, UnknownAgentError
from ecavg.edge_agent.member import Member
from ecavg.edge_agent.state import AgentState, Arrived, Progress, Report
from tests.faults.started import (
    Blocked,
    Sluggish,
    Started,
    Steered,
    train_blocked,
)
from tests.processes import Cluster


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
