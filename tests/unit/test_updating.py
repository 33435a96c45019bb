"""What follows when another model is in use, by real commands."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError
from ecavg.common.run_state import Phase
from ecavg.edge_agent import exporting
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.history import History, Source
from ecavg.edge_agent.member import Member
from ecavg.edge_agent.metrics import UPDATE_RESULTS, AgentMetrics
from ecavg.edge_agent.news import News
from ecavg.edge_agent.readiness import Readiness
from ecavg.edge_agent.state import AgentState
from ecavg.edge_agent.updating import Told, Updates
from ecavg.edge_agent.worker import Worker
from tests.unit.test_history import take
from tests.unit.test_run_display import STATE

ENVIRONMENT = 'echo "$ECAVG_ROUND $ECAVG_SOURCE $ECAVG_MODEL $ECAVG_MODEL_SHA256 $ECAVG_REPORT $ECAVG_EXPORT"'


class Device:
    """A device whose models come into use when a test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = AgentState(folder / "state", "edge-1")
        self.history = History(self.disk.path, 3)
        self.calls = folder / "calls"
        self.said: list[str] = []
        self.metrics = AgentMetrics()
        self.worker = Worker(self.said.append)

    def take(self, number: int, source: Source = Source.PUBLISHED) -> None:
        take(self.history, self.folder, number, source)

    def updates(self, script: str = "", **keys: object) -> Updates:
        command = ("sh", "-c", script.replace("CALLS", str(self.calls))) if script else ()
        config = AgentConfig(server="127.0.0.1:1", on_update=command, **keys)
        return Updates(config, self.disk, self.worker, self.metrics, self.said.append)

    def lines(self) -> list[str]:
        return self.calls.read_text("utf-8").splitlines() if self.calls.exists() else []

    def counts(self) -> list[float]:
        return [self.metrics.updates_total.labels(result)._value.get() for result in UPDATE_RESULTS]


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    device = Device(tmp_path)
    yield device
    device.worker.close()
    device.disk.close()


async def test_command_is_told_of_each_model_once(device: Device) -> None:
    updates = device.updates(f"{ENVIRONMENT} >> CALLS")
    assert await updates.tell() == Told()
    device.take(1, Source.PRE_TRAINED)
    for _ in range(2):
        assert await updates.tell() == Told()
    device.take(2)
    # Another life of the agent tells of what this one has not.
    for _ in range(2):
        assert await device.updates(f"{ENVIRONMENT} >> CALLS").tell() == Told()
    first, second = device.history.uses()
    state = device.disk.path
    assert device.lines() == [
        f"1 pre-trained {state / 'model.safetensors'} {first.digest}  ",
        f"2 published {state / 'model.safetensors'} {second.digest} {state / 'report.json'} ",
    ]
    assert device.counts() == [2, 0, 0]


async def cut_off(updates: Updates, device: Device) -> None:
    """Have it tell, and cancel that once the command runs."""
    telling = asyncio.create_task(updates.tell())
    async with asyncio.timeout(10):
        while True:
            if device.lines():
                break
            await asyncio.sleep(0.005)
    telling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await telling


async def test_command_that_was_cut_off_runs_again(device: Device) -> None:
    device.take(1)
    await cut_off(device.updates("echo begun >> CALLS; sleep 60"), device)
    assert not device.history.latest().is_told
    assert await device.updates("echo again >> CALLS").tell() == Told()
    assert device.lines() == ["begun", "again"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "on_update: sh ended with exit code 3"),
        ("sleep 60", "on_update: sh took longer than 0.2 seconds"),
    ],
)
async def test_failure_is_told_and_the_model_kept(script: str, reason: str, device: Device) -> None:
    device.take(1)
    device.take(2)
    updates = device.updates(script, on_update_seconds=0.2)
    # What has failed is not tried again; the report must hear of it after a restart, too.
    for _ in range(2):
        assert await updates.tell() == Told(reason)
    assert device.said == [f"round 2: {reason}; the model stays in use"]
    assert (device.history.latest().round, device.history.latest().failure) == (2, reason)
    assert device.counts() == [0, 1, 0]


async def test_failure_rolls_back_where_that_is_wanted_and_the_command_is_told(device: Device) -> None:
    script = 'echo "$ECAVG_ROUND $ECAVG_SOURCE" >> CALLS; test $ECAVG_ROUND != 2'
    updates = device.updates(script, on_update_failure="roll-back")
    device.take(1)
    assert await updates.tell() == Told()
    device.take(2)
    reason = "on_update: sh ended with exit code 1"
    assert await updates.tell() == Told(reason, is_rolled_back=True)
    assert device.lines() == ["1 published", "2 published", "1 rolled-back"]
    assert device.said == [f"round 2: {reason}; rolled back to the model of round 1"]
    assert device.history.latest().digest == device.history.uses()[0].digest
    assert device.counts() == [2, 0, 1]


async def test_rolling_back_ends_where_every_model_fails(device: Device) -> None:
    for number in (1, 2, 3):
        device.take(number)
    told = await device.updates("echo $ECAVG_ROUND >> CALLS; false", on_update_failure="roll-back").tell()
    assert told.is_rolled_back
    assert device.lines() == ["3", "2"]
    assert device.history.latest().round == 2


def test_rolling_back_without_a_model_to_go_back_to_is_refused() -> None:
    assert AgentConfig(server="127.0.0.1:1", keep_models=1).keep_models == 1
    with pytest.raises(ValueError, match="needs the model before: make it 2 or more"):
        AgentConfig(server="127.0.0.1:1", keep_models=1, on_update_failure="roll-back")


async def test_first_model_is_kept_though_it_fails_because_none_was_before(device: Device) -> None:
    device.take(1)
    told = await device.updates("false", on_update_failure="roll-back").tell()
    assert told == Told("on_update: sh ended with exit code 1")
    assert device.history.latest().round == 1


@pytest.mark.parametrize("is_fit", [True, False])
async def test_export_is_written_before_the_command_runs(
    is_fit: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*args: object) -> None:
        if not is_fit:
            raise RunError("its logits differ")
        args[4].write_text("exported")

    monkeypatch.setattr(exporting, "export", export)
    device.take(1)
    told = await device.updates('cat "$ECAVG_EXPORT" >> CALLS', export="torch-export").tell()
    assert told == (Told() if is_fit else Told("its logits differ"))
    assert device.lines() == (["exported"] if is_fit else [])
    assert (device.disk.path / "model.pt2").exists() == is_fit


async def test_output_of_the_command_is_in_the_log_at_debug_level(
    device: Device, logged: Callable[[], list[dict[str, object]]]
) -> None:
    device.take(1)
    await device.updates("echo to stdout; echo to stderr >&2; exit 1").tell()
    (entry,) = [entry for entry in logged() if entry["event"] == "on_update"]
    assert (entry["log_level"], entry["output"]) == ("debug", "to stdout\nto stderr\n")


@pytest.fixture
def logged() -> Callable[[], list[dict[str, object]]]:
    from structlog.testing import capture_logs

    with capture_logs() as entries:
        yield lambda: list(entries)


async def test_model_whose_telling_was_cut_off_is_told_of_before_the_agent_leaves(device: Device) -> None:
    updates = device.updates("test -e CALLS && exec echo again >> CALLS; echo begun >> CALLS; sleep 60")
    news = News()
    nobody: Any = None
    member = Member(
        RunConfig(),
        nobody,
        disk=device.disk,
        worker=device.worker,
        data=nobody,
        news=news,
        readiness=Readiness((), 60.0, device.said.append, nobody),
        new_examples=nobody,
        updates=updates,
        metrics=device.metrics,
        display=nobody,
        teller=nobody,
    )
    news.tell(replace(STATE, phase=Phase.AGGREGATING))
    taking_part = asyncio.create_task(member.take_part())
    async with asyncio.timeout(10):
        while True:
            if device.metrics.registry.get_sample_value("ecavg_agent_phase", {"phase": "waiting"}):
                break
            await asyncio.sleep(0.005)
        # What a contribution does, until it is in vain.
        device.take(1, Source.PRE_TRAINED)
        await cut_off(updates, device)
        news.tell(replace(STATE, run_over=True))
        await taking_part
    assert device.lines() == ["begun", "again"]
    assert device.history.latest().is_told
