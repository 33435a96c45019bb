"""What blocks is done in turn, and a full disk is waited out."""

import asyncio
import errno
import threading

import pytest

from ecavg.common import rpc
from ecavg.edge_agent.worker import Worker

FULL = OSError(errno.ENOSPC, "No space left on device", "somewhere")


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)


async def test_what_finds_the_disk_full_is_done_again_until_there_is_room() -> None:
    said: list[str] = []
    worker = Worker(said.append)
    errors = [FULL, OSError("cannot write x: I/O error: No space left on device (os error 28)"), FULL]

    def write(value: int) -> int:
        if errors:
            raise errors.pop()
        return value

    assert await worker.run(write, 7) == 7
    assert len(said) == 2
    assert "disk is full" in said[0]
    assert "there is room" in said[1]
    worker.close()


async def test_other_errors_of_the_disk_are_not_waited_out() -> None:
    worker = Worker(lambda _: None)

    def write() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        await worker.run(write)
    worker.close()


async def test_what_was_left_is_over_before_the_next_thing_begins() -> None:
    worker, entered, release = Worker(lambda _: None), threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        entered.set()
        release.wait(10)
        order.append("first")

    left = asyncio.create_task(worker.run(first))
    await asyncio.to_thread(entered.wait, 10)
    left.cancel()
    await asyncio.wait((left,))
    after = asyncio.create_task(worker.run(order.append, "second"))
    await asyncio.sleep(0)
    release.set()
    await after
    assert order == ["first", "second"]
    worker.close()
