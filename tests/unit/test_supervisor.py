import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from cloud_server import supervisor
from cloud_server.supervisor import TrainerProcess


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 0.01)


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


class Exits(asyncio.Queue[int]):
    """Return codes, as they come in."""

    def __call__(self, returncode: int) -> None:
        self.put_nowait(returncode)


async def line_of(fifo: Path) -> str:
    """What is written to the named pipe next; waits for it."""
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
    exits = Exits()
    trainer = TrainerProcess(tmp_path, on_exit=exits, command=shell("exit 3"))
    assert trainer.num_exits == 0
    await trainer.start()
    assert [await exits.get() for _ in range(3)] == [3, 3, 3]
    assert trainer.num_exits >= 3
    await trainer.stop()


async def test_a_trainer_that_is_killed_is_replaced(tmp_path, fifo):
    exits = Exits()
    trainer = TrainerProcess(tmp_path, on_exit=exits, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    first = int(await line_of(fifo))
    assert trainer.pid == first
    os.kill(first, signal.SIGKILL)
    assert await exits.get() == -signal.SIGKILL
    second = int(await line_of(fifo))
    assert second != first
    assert trainer.pid == second
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
    exits = Exits()
    trainer = TrainerProcess(tmp_path, on_exit=exits, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    pid = int(await line_of(fifo))
    await trainer.stop()
    assert not is_alive(pid)
    assert trainer.pid is None
    assert trainer.num_exits == 0
    assert exits.empty()
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


async def test_the_trainer_has_a_process_group_of_its_own(tmp_path, fifo):
    trainer = TrainerProcess(tmp_path, command=shell(f"echo $$ > {fifo}; exec cat"))
    await trainer.start()
    pid = int(await line_of(fifo))
    assert os.getpgid(pid) == pid != os.getpgid(0)
    await trainer.stop()


async def test_a_command_that_cannot_be_started_counts_as_dead_and_is_tried_again(tmp_path):
    exits = Exits()
    trainer = TrainerProcess(tmp_path, on_exit=exits, command=["/nonexistent"])
    await trainer.start()
    assert [await exits.get() for _ in range(2)] == [os.EX_OSERR] * 2
    await trainer.stop()


async def test_the_trainer_leaves_when_the_server_is_killed(tmp_path, fifo):
    script = f"echo here > {fifo}; cat; echo gone > {fifo}"
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from cloud_server.supervisor import TrainerProcess\n"
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
        sys.executable, "-m", "cloud_server.trainer", "--state-dir", str(tmp_path), "--device", "cpu"
    ]  # fmt: skip
