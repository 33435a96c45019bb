"""The readiness of a device, by real commands."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ecavg.common.background import beside
from ecavg.common.run_state import Wait
from ecavg.edge_agent import readiness
from ecavg.edge_agent.readiness import Readiness


class Device:
    """A device that is asked all the time, and what it has said."""

    def __init__(self, *command: object) -> None:
        self.said: list[str] = []
        self.changes: list[Wait | None] = []
        self.readiness = Readiness([*map(str, command)], 0.01, self.said.append, self.changes.append)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.001)


@asynccontextmanager
async def asked(*command: object) -> AsyncIterator[Device]:
    device = Device(*command)
    async with beside(device.readiness.keep_asking()):
        yield device


async def test_device_without_a_command_is_always_ready() -> None:
    device = Device()
    await device.readiness.keep_asking()
    assert device.readiness.is_ready
    assert device.said == device.changes == []


async def test_answer_is_told_when_it_changes_and_no_oftener(tmp_path: Path) -> None:
    runs, ready = tmp_path / "runs", tmp_path / "ready"
    async with asked("sh", "-c", f"echo >> {runs}; test -e {ready}") as device:
        assert not device.readiness.is_ready
        await device.until(lambda: runs.exists() and runs.stat().st_size > 3)
        assert device.said == ["not ready: sh ended with exit code 1; taking part when ready_command says so"]
        assert device.changes == [Wait.COMMAND]
        ready.touch()
        await device.until(lambda: len(device.changes) == 2)
        ready.unlink()
        await device.until(lambda: len(device.changes) == 3)
    assert device.changes == [Wait.COMMAND, None, Wait.COMMAND]
    assert device.said == [device.said[0], "ready: taking part again", device.said[0]]


async def test_device_that_is_ready_at_the_start_says_nothing() -> None:
    async with asked("true") as device:
        await device.until(lambda: device.changes == [None])
    assert device.said == []


async def test_command_that_takes_too_long_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "LIMIT_SECONDS", 0.2)
    child = tmp_path / "child"
    async with asked("sh", "-c", f"sleep 600 & echo $! > {child}; wait") as device:
        await device.until(lambda: bool(device.said))
    assert "sh took longer than 0.2 seconds" in device.said[0]
    number = int(child.read_text("ascii"))
    await device.until(lambda: not is_running(number))


def is_running(process_id: int) -> bool:
    """Return True unless the process is gone, or a zombie that nobody has waited for."""
    try:
        os.kill(process_id, 0)
        return Path(f"/proc/{process_id}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_command_that_is_gone_is_no_end_of_the_agent(tmp_path: Path) -> None:
    async with asked(tmp_path / "gone") as device:
        await device.until(lambda: bool(device.said))
    assert "gone cannot be run (No such file or directory)" in device.said[0]


async def test_command_that_runs_when_the_agent_ends_is_ended_and_reaped(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    async with asked("sh", "-c", f"echo $$ > {file}; exec sleep 60") as device:
        await device.until(lambda: file.exists() and file.stat().st_size > 0)
    # The process is gone, and is no zombie either.
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text("ascii")), 0)
