"""Whether the server stays for those who watch its status."""

import asyncio

import pytest

from ecavg.cloud_server.showing import viewers
from ecavg.cloud_server.showing.viewers import Viewers


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the times that the server has stayed for."""
    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return seconds


async def test_server_stays_for_those_who_have_just_looked(slept: list[float]) -> None:
    here = Viewers()
    await here.stay()
    assert slept == []
    here.note()
    await here.stay()
    assert slept == [viewers.LOOK_SECONDS]


async def test_server_does_not_stay_for_those_who_have_gone(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Viewers()
    here.note()
    now = viewers.time.monotonic()
    monkeypatch.setattr(viewers.time, "monotonic", lambda: now + viewers.LOOK_SECONDS + 1)
    await here.stay()
    assert slept == []
