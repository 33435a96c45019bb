"""An agent tells how far it is: not too often, not of what is short, and never at its own cost."""

import asyncio
from collections.abc import Callable

import pytest

from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.errors import Reason, UnavailableError
from ecavg.edge_agent import teller as teller_module
from ecavg.edge_agent.teller import Teller

TRAINING = AgentProgress(Activity.PRE_TRAINING, 0, 10)


class Cloud:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[AgentProgress | None] = []
        self.answers = True
        self.pause_seconds = 0.0

    async def tell_progress(self, progress: AgentProgress | None) -> float:
        self.told.append(progress)
        if not self.answers:
            raise UnavailableError("the server has gone", Reason.UNAVAILABLE)
        return self.pause_seconds

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


@pytest.fixture
def teller(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Teller:
    monkeypatch.setattr(teller_module, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(teller_module, "AGAIN_SECONDS", 0.001)
    return Teller(cloud)  # type: ignore[arg-type]


async def test_latest_progress_is_told_again_and_again_and_the_end_once(teller: Teller, cloud: Cloud) -> None:
    async with teller.telling(TRAINING):
        await cloud.until(lambda: cloud.told.count(TRAINING) >= 2)
        further = TRAINING._replace(done=5)
        teller.note(further)
        await cloud.until(lambda: further in cloud.told)
    await cloud.until(lambda: cloud.told[-1] is None)
    num_told = len(cloud.told)
    await asyncio.sleep(0.02)
    assert len(cloud.told) == num_told


async def test_nothing_is_told_of_what_is_short(cloud: Cloud) -> None:
    async with Teller(cloud).telling(TRAINING):  # type: ignore[arg-type]
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert cloud.told == []


async def test_server_that_does_not_answer_disturbs_nothing(teller: Teller, cloud: Cloud) -> None:
    cloud.answers = False
    async with teller.telling(TRAINING):
        await cloud.until(lambda: len(cloud.told) >= 3)
    await cloud.until(lambda: cloud.told[-1] is None)


async def test_server_says_how_often_it_wants_to_be_told(teller: Teller, cloud: Cloud) -> None:
    cloud.pause_seconds = 60.0
    async with teller.telling(TRAINING):
        await cloud.until(lambda: bool(cloud.told))
        await asyncio.sleep(0.02)
        assert cloud.told == [TRAINING]


async def test_work_that_is_cancelled_is_not_held_up(teller: Teller, cloud: Cloud) -> None:
    async def work() -> None:
        async with teller.telling(TRAINING):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await cloud.until(lambda: bool(cloud.told))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await cloud.until(lambda: cloud.told[-1] is None)
