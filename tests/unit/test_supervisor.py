import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ecavg.cloud_server.training import supervisor
from ecavg.cloud_server.training.supervisor import TrainerProcess


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 0.01)


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - most conditions are on the disk
        await asyncio.sleep(0.001)


def returncodes(events: list[Any]) -> list[int]:
    return [event["returncode"] for event in events if event["event"] == "trainer_died"]


async def line_of(fifo: Path) -> str:
    """Wait for the next text that is written to the named pipe, and return it."""
    return (await asyncio.to_thread(fifo.read_text)).strip()


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_trainer_that_dies_is_started_again(tmp_path):
    trainer = TrainerProcess(tmp_path, command=shell("exit 3"))
    assert trainer.num_exits == 0
    with capture_logs() as events:
        await trainer.start()
        await until(lambda: trainer.num_exits >= 3)
        await trainer.stop()
    assert returncodes(events) == [3] * trainer.num_exits


async def test_a_trainer_that_is_killed_is_replaced(tmp_path, fifo):
    trainer = TrainerProcess(tmp_path, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    first = int(await line_of(fifo))
    await until(lambda: trainer.pid == first)
    with capture_logs() as events:
        os.kill(first, signal.SIGKILL)
        second = int(await line_of(fifo))
    assert returncodes(events) == [-signal.SIGKILL]
    assert second != first
    await until(lambda: trainer.pid == second)
    await trainer.stop()
    assert not is_alive(second)


async def test_pauses_grow_up_to_the_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 5.0)
    pauses = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 7:
            enough.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
    trainer = TrainerProcess(tmp_path, command=shell("exit 1"))
    await trainer.start()
    await enough.wait()
    await trainer.stop()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


async def test_pauses_begin_anew_after_a_healthy_life(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "HEALTHY_SECONDS", 0.0)
    pauses = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            enough.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
    trainer = TrainerProcess(tmp_path, command=shell("exit 1"))
    await trainer.start()
    await enough.wait()
    await trainer.stop()
    assert pauses == [0.001, 0.001, 0.001]


async def test_stop_ends_the_trainer_and_does_not_count_it_as_dead(tmp_path, fifo):
    trainer = TrainerProcess(tmp_path, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    pid = int(await line_of(fifo))
    await trainer.stop()
    assert not is_alive(pid)
    assert trainer.pid is None
    assert trainer.num_exits == 0
    await trainer.stop()


async def test_restarted_trainer_has_left_and_another_one_comes(tmp_path, fifo):
    trainer = TrainerProcess(tmp_path, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.restart()  # there is none yet
    await trainer.start()
    first = int(await line_of(fifo))
    await until(lambda: trainer.pid == first)  # it may say so before its start is known here
    await trainer.restart()
    assert not is_alive(first)
    assert trainer.num_exits == 1
    second = int(await line_of(fifo))
    assert second != first
    await trainer.stop()


async def test_stop_kills_a_trainer_that_does_not_leave(tmp_path, fifo, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.05)
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "while True: signal.pause()\n"
    )
    trainer = TrainerProcess(tmp_path, command=[sys.executable, "-S", "-c", program, str(fifo)])
    await trainer.start()
    pid = int(await line_of(fifo))
    await trainer.stop()
    assert not is_alive(pid)


async def test_a_trainer_that_was_never_started_can_be_stopped(tmp_path):
    await TrainerProcess(tmp_path, command=shell("exit 1")).stop()


async def test_stop_works_right_after_start(tmp_path):
    trainer = TrainerProcess(tmp_path, command=shell("exec cat"))
    await trainer.start()
    await trainer.stop()
    assert trainer.pid is None


async def test_output_is_added_to_the_log(tmp_path, fifo):
    (tmp_path / "trainer.log").write_text("before\n")
    trainer = TrainerProcess(tmp_path, command=shell(f"echo out; echo err >&2; echo done > {fifo}; exec cat"))
    await trainer.start()
    await line_of(fifo)
    await trainer.stop()
    assert (tmp_path / "trainer.log").read_text() == "before\nout\nerr\n"


async def test_long_log_is_put_aside_at_the_start(tmp_path, fifo, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 6)
    (tmp_path / "trainer.log").write_text("before\n")
    (tmp_path / "trainer.log.1").write_text("long before\n")
    trainer = TrainerProcess(tmp_path, command=shell(f"read line; echo after; echo > {fifo}; cat"))
    await trainer.start()
    await until(lambda: (tmp_path / "trainer.log").stat().st_size == 0)
    await trainer.stop()
    assert (tmp_path / "trainer.log.1").read_text() == "before\n"


async def test_log_of_a_long_life_is_put_aside_and_written_on(tmp_path, fifo, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 6)
    monkeypatch.setattr(supervisor, "LOG_CHECK_SECONDS", 0.001)
    script = f"echo something long; cat {fifo}; echo next; echo > {fifo}; cat"
    trainer = TrainerProcess(tmp_path, command=shell(script))
    await trainer.start()
    await until((tmp_path / "trainer.log.1").exists)
    await until(lambda: (tmp_path / "trainer.log").stat().st_size == 0)
    await asyncio.to_thread(fifo.write_text, "")
    await line_of(fifo)
    await trainer.stop()
    assert (tmp_path / "trainer.log.1").read_text() == "something long\n"
    assert (tmp_path / "trainer.log").read_text() == "next\n"
    assert trainer.num_exits == 0


async def test_disk_that_does_not_let_the_log_rotate_does_not_end_the_trainer(tmp_path, fifo, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 0)
    (tmp_path / "trainer.log").write_text("before\n")
    (tmp_path / "trainer.log.1").mkdir()
    trainer = TrainerProcess(tmp_path, command=shell(f"echo here > {fifo}; cat"))
    with capture_logs() as events:
        await trainer.start()
        assert await line_of(fifo) == "here"
        await until(lambda: events)
        await trainer.stop()
    assert [event["event"] for event in events] == ["trainer_log_not_rotated"]


async def test_the_trainer_has_a_process_group_of_its_own(tmp_path, fifo):
    trainer = TrainerProcess(tmp_path, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    pid = int(await line_of(fifo))
    assert os.getpgid(pid) == pid != os.getpgid(0)
    await trainer.stop()


async def test_a_command_that_cannot_be_started_counts_as_dead_and_is_tried_again(tmp_path):
    trainer = TrainerProcess(tmp_path, command=["/nonexistent"])
    with capture_logs() as events:
        await trainer.start()
        await until(lambda: trainer.num_exits >= 2)
        await trainer.stop()
    assert returncodes(events) == [os.EX_OSERR] * trainer.num_exits


async def test_the_trainer_leaves_when_the_server_is_killed(tmp_path, fifo):
    script = f"echo here > {fifo}; cat; echo gone > {fifo}"
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from ecavg.cloud_server.training.supervisor import TrainerProcess\n"
        "async def main():\n"
        "    await TrainerProcess(Path(sys.argv[1]), command=['/bin/sh', '-c', sys.argv[2]]).start()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path), script)
    assert await line_of(fifo) == "here"
    server.kill()
    assert await line_of(fifo) == "gone"
    await server.wait()


def test_the_trainer_is_this_python(tmp_path):
    command = TrainerProcess(tmp_path, device="cpu")._command
    assert command == [
        sys.executable, "-m", "ecavg.cloud_server.trainer", "--state-dir", str(tmp_path), "--device", "cpu"
    ]  # fmt: skip


async def test_trainer_works_without_a_log_that_cannot_be_opened(tmp_path, fifo):
    (tmp_path / "trainer.log").mkdir()
    trainer = TrainerProcess(tmp_path, command=shell(f"echo lost; echo at work > {fifo}; exec sleep 60"))
    with capture_logs() as events:
        await trainer.start()
        assert await line_of(fifo) == "at work"
        await trainer.stop()
    assert [event["event"] for event in events] == ["trainer_log_not_written"]
