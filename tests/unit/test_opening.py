"""When the next round opens after one is over, in runs of world.py whose clock the test sets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from ecavg.cloud_server import coordinator
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.showing.opening import OpeningRule
from ecavg.common.cron import CronLine
from ecavg.common.run_state import Availability, Outcome, Phase, Wait
from tests.unit.world import World, hurry, world

BERLIN = ZoneInfo("Europe/Berlin")
EVENING = datetime(2026, 11, 28, 23, tzinfo=BERLIN).timestamp()
NIGHT = datetime(2026, 11, 29, 2, tzinfo=BERLIN).timestamp()
HOUR = 3600.0
AT_NIGHT: dict[str, Any] = {"open_round_at": "0 2 * * *", "time_zone": "Europe/Berlin"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(coordinator, "OPENING_POLL_SECONDS", 0.005)


class Clock:
    def __init__(self) -> None:
        self.now = EVENING

    def __call__(self) -> float:
        return self.now


async def publish(here: World, number: int = 1) -> None:
    await here.until(lambda: here.standing.state_for().round == number)
    assert await here.contribute("a", number) is Outcome.ACCEPTED
    await here.until(lambda: here.standing.state_for().phase is Phase.PUBLISHED)


async def stays_closed(here: World) -> None:
    """Check that the coordinator, having looked several times, has not opened the next round."""
    number, looks = here.standing.current.number, 0
    real = here.standing.show_opening

    def look(opening: Any) -> None:
        nonlocal looks
        looks += 1
        real(opening)

    here.standing.show_opening = look  # type: ignore[method-assign]
    await here.until(lambda: looks > 3)
    assert here.standing.current.number == number


async def opens(here: World, number: int) -> None:
    await here.until(lambda: here.standing.state_for().round == number)
    assert here.standing.state_for().phase is Phase.COLLECTING


async def test_round_opens_at_the_time_and_everybody_is_told_when(tmp_path: Path) -> None:
    clock = Clock()
    async with world(tmp_path / "state", clock=clock, **AT_NIGHT) as here:
        await publish(here)
        await here.until(lambda: here.standing.state_for("a").next_round_at == NIGHT)
        status = await here.status.read()
        assert status["waiting"] == "The next round opens at 02:00 CET (in 3 h)."
        assert status["next_round"] == {"at": NIGHT, "num_examples": None, "num_new_examples": 0}
        clock.now = NIGHT - 1
        await stays_closed(here)
        clock.now = NIGHT
        await opens(here, 2)
        assert here.standing.state_for().next_round_at is None
        assert (await here.status.read())["next_round"] is None
        # The deadline counts from the opening.
        assert here.standing.current.opened_at == NIGHT


async def test_time_of_a_round_that_failed_counts_as_well(tmp_path: Path) -> None:
    clock = Clock()
    keys = AT_NIGHT | {"deadline_seconds": 0.01, "on_too_few": "fail"}
    async with world(tmp_path / "state", clock=clock, **keys) as here:
        await here.until(lambda: here.standing.state_for().phase is Phase.FAILED)
        await stays_closed(here)


async def test_restart_neither_forgets_the_time_nor_misses_it(tmp_path: Path) -> None:
    clock = Clock()
    async with world(tmp_path / "state", clock=clock, **AT_NIGHT) as here:
        await publish(here)
    clock.now = NIGHT - HOUR
    async with world(tmp_path / "state", clock=clock, **AT_NIGHT) as here:
        await stays_closed(here)
        assert here.standing.state_for().next_round_at == NIGHT
    # The server was not there at that time.
    clock.now = NIGHT + 5 * HOUR
    async with world(tmp_path / "state", clock=clock, **AT_NIGHT) as here:
        await opens(here, 2)


async def test_last_round_is_the_end_of_the_run_whatever_the_time(tmp_path: Path) -> None:
    async with world(tmp_path / "state", clock=Clock(), rounds=1, **AT_NIGHT) as here:
        await publish(here)
        await asyncio.wait_for(here.running, 10)
        assert (await here.status.read())["waiting"] is None


async def test_contribution_while_no_round_is_open_is_late(tmp_path: Path) -> None:
    async with world(tmp_path / "state", clock=Clock(), **AT_NIGHT) as here:
        await publish(here)
        assert await here.contribute("b", 1) is Outcome.LATE


def test_end_by_a_clock_that_was_wrong_does_not_keep_the_next_round_closed() -> None:
    rule = OpeningRule(CronLine("0 2 * * *", BERLIN))
    assert rule.after(EVENING + 1000 * 24 * HOUR, now=EVENING).at == NIGHT


# ---------------------------------------------------------------------- by what the agents have


@asynccontextmanager
async def watching(here: World, agent_id: str, **said: Any) -> AsyncIterator[None]:
    """Have an agent watch for a while that says so much of itself."""

    async def follow() -> None:
        async for _ in here.desk.watch(agent_id, Availability(**said)):
            pass

    task = asyncio.create_task(follow())
    await here.until(lambda: here.standing.is_watched_by(agent_id))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until_status(here: World, is_awaited: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_awaited(await here.status.read()):  # noqa: ASYNC110  it changes with the coordinator
            await asyncio.sleep(0.005)


async def test_round_opens_when_the_agents_that_are_here_have_enough_new_examples(tmp_path: Path) -> None:
    async with world(tmp_path / "state", open_round_when_new_examples=500) as here:
        await publish(here)
        await here.desk.join("b")
        async with watching(here, "a", num_new_examples=300):
            await until_status(
                here,
                lambda status: (
                    status["waiting"]
                    == "The next round opens when the agents that are here have 500 new examples: 300 so far."
                ),
            )
            assert here.standing.state_for("a").num_examples_to_open == 500
            await stays_closed(here)
            async with watching(here, "b", num_new_examples=200):
                await opens(here, 2)


async def test_agent_that_has_left_does_not_count(tmp_path: Path) -> None:
    async with world(tmp_path / "state", open_round_when_new_examples=500) as here:
        await publish(here)
        async with watching(here, "a", num_new_examples=499):
            pass
        await here.desk.join("b")
        async with watching(here, "b", num_new_examples=499):
            await stays_closed(here)


async def test_what_an_agent_has_contributed_with_is_new_no_more(tmp_path: Path) -> None:
    async with world(tmp_path / "state", open_round_when_new_examples=500) as here:
        await here.desk.join("a")
        async with watching(here, "a", num_new_examples=600):
            await publish(here)
            await stays_closed(here)
            assert (await here.status.read())["next_round"]["num_new_examples"] == 0


@pytest.mark.parametrize(
    ("is_ready", "waits_for", "sentence"),
    [
        (False, None, "a is not ready to take part"),
        (False, Wait.EXAMPLES, "a waits for new examples"),
        (True, Wait.UPLOAD_HOURS, "a waits for the hours in which it uploads"),
        (True, None, "a has not contributed"),
    ],
)
async def test_page_says_what_an_agent_waits_for(
    tmp_path: Path, is_ready: bool, waits_for: Wait | None, sentence: str
) -> None:
    async with world(tmp_path / "state") as here:
        await here.desk.join("a")
        async with watching(here, "a", is_ready=is_ready, waits_for=waits_for):
            status = await here.status.read()
        assert status["agents"][0]["waits_for"] == waits_for
        assert status["agents"][0]["is_ready"] == is_ready
        assert f"Waiting for 1 of 1: {sentence}." in status["waiting"]
        # What it has said is forgotten with it.
        assert (await here.status.read())["agents"][0]["waits_for"] is None


# ---------------------------------------------------------------------- what the operator writes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"open_round_at": "0 25 * * *"}, "open_round_at.*is no line of cron"),
        ({"open_round_at": "0 2 * * *", "time_zone": "Mars/Base"}, "time_zone.*is no time zone"),
        ({"time_zone": "UTC"}, "time_zone is for open_round_at"),
        ({"open_round_at": "0 2 * * *", "open_round_when_new_examples": 5}, "cannot be combined"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        ServerConfig(**keys)
