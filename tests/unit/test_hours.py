"""Hours of the day, and a device that works within them."""

import time

import pytest
from pydantic import ValidationError

from ecavg.common.background import beside
from ecavg.common.errors import UsageError
from ecavg.common.run_state import Wait
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.hours import local_minute, parse_hours
from ecavg.edge_agent.readiness import Readiness, within
from tests.unit.test_readiness import Device


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("09:00-17:30", ["09:00", "17:29"], ["08:59", "17:30", "00:00"]),
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["21:59", "06:00", "12:00"]),
        ("18:00-00:00", ["18:00", "23:59"], ["00:00", "17:59"]),
    ],
)
def test_hours_contain_their_begin_and_not_their_end(
    text: str, inside: list[str], outside: list[str]
) -> None:
    def contained(clock: str) -> bool:
        now = time.strptime(clock, "%H:%M")
        return parse_hours(text).contain(local_minute(lambda: now))

    assert all(contained(clock) for clock in inside)
    assert not any(contained(clock) for clock in outside)


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:60-06:00", "22:00-22:00", "22:00-06:00 "])
def test_text_that_names_no_hours_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="are no hours: write begin and end, such as 22:00-06:00"):
        parse_hours(text)
    with pytest.raises(ValidationError, match="work_hours"):
        AgentConfig(server="127.0.0.1:1", work_hours=(text,))


async def test_device_takes_part_within_its_hours_and_asks_its_command_only_then() -> None:
    device, minute = Device(), [21 * 60]
    hours = [parse_hours("22:00-06:00"), parse_hours("12:00-13:00")]
    device.readiness = Readiness(
        ("false",), 0.01, device.said.append, device.changes.append, [within(hours, lambda: minute[0])]
    )
    outside = "not ready: it is outside of work_hours; taking part within them"
    command = "not ready: false ended with exit code 1; taking part when ready_command says so"
    async with beside(device.readiness.keep_asking()):
        await device.until(lambda: device.said == [outside])
    assert not device.readiness.is_ready

    device.said.clear()
    device.changes.clear()
    device.readiness = Readiness(
        (), 0.01, device.said.append, device.changes.append, [within(hours, lambda: minute[0])]
    )
    async with beside(device.readiness.keep_asking()):
        await device.until(lambda: device.said == [outside])
        minute[0] = 12 * 60
        await device.until(lambda: device.changes == [Wait.HOURS, None])
        minute[0] = 13 * 60
        await device.until(lambda: device.changes == [Wait.HOURS, None, Wait.HOURS])
    assert device.said == [outside, "ready: taking part again", outside]

    minute[0] = 0
    device.said.clear()
    device.readiness = Readiness(
        ("false",), 0.01, device.said.append, device.changes.append, [within(hours, lambda: minute[0])]
    )
    async with beside(device.readiness.keep_asking()):
        await device.until(lambda: device.said == [command])
