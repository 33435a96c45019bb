"""Lines of cron, in time zones that change their clocks."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from ecavg.common.cron import local_zone, parse_cron, parse_zone, spoken
from ecavg.common.errors import UsageError

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


@pytest.mark.parametrize(
    ("line", "now", "expected"),
    [
        ("0 2 * * *", "2026-11-28 22:00", "2026-11-29 02:00"),
        ("0 2 * * *", "2026-11-29 02:00", "2026-11-30 02:00"),
        ("0 2 * * *", "2026-11-29 01:59:59.5", "2026-11-29 02:00"),
        ("*/15  8-18 * * MON-FRI", "2026-11-28 22:00", "2026-11-30 08:00"),
        # The last Sunday of March: from 02:00 to 03:00 there is no time.
        ("30 2 * * *", "2026-03-28 12:00", "2026-03-29 03:00"),
    ],
)
def test_next_time_is_the_first_that_the_line_names(line: str, now: str, expected: str) -> None:
    assert parse_cron(line, BERLIN).next_after(at(now)) == at(expected)


def test_time_that_comes_twice_in_autumn_is_named_once() -> None:
    line = parse_cron("30 2 * * *", BERLIN)
    first = line.next_after(at("2026-10-24 12:00"))
    assert first == at("2026-10-25 02:30")
    assert line.next_after(first) == at("2026-10-26 02:30")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "wrong is its number of fields"),
        ("0 2 * *", "wrong is its number of fields"),
        ("0 0 2 * * *", "wrong is its number of fields"),
        ("@daily", "wrong is its number of fields"),
        ("0 25 * * *", "wrong is its hour"),
        ("0 2 * * XYZ", "wrong is its day-of-week"),
        ("0 2 30 2 *", "wrong is its day-of-month"),
    ],
)
def test_line_that_is_none_is_refused_with_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"is no line of cron .{what}.: write minute, hour") as caught:
        parse_cron(text, UTC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Europe/Berlim", "", "/etc/passwd", "../UTC", "x\ny"])
def test_zone_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no time zone of this machine: write a name") as caught:
        parse_zone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Europe/Berlin", ":Europe/Berlin"])
def test_zone_of_the_machine_knows_when_its_clocks_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", name)
    line = parse_cron("0 2 * * *", parse_zone(None))
    assert line.next_after(at("2026-07-01 12:00")) == at("2026-07-02 02:00")
    assert line.next_after(at("2026-12-01 12:00")) == at("2026-12-02 02:00")


@pytest.mark.parametrize("name", ["<+03>-3", ""])
def test_machine_without_a_name_of_its_zone_has_one_all_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", name)
    assert datetime.now(local_zone()).utcoffset() is not None


def test_time_is_said_with_its_zone_and_how_long_it_takes() -> None:
    now = at("2026-11-28 23:00")
    assert spoken(at("2026-11-29 02:00"), now, BERLIN) == "at 02:00 CET (in 3 h)"
    assert spoken(at("2026-12-01 02:00"), now, BERLIN) == "on 2026-12-01 at 02:00 CET (in 2 d)"
    assert spoken(now - 1, now, UTC) == "at 21:59 UTC (in 0 s)"
