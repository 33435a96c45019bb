"""How fast work gets on, from what is told of it."""

import pytest

from ecavg.common.pace import PACE_SECONDS, Pace


def told(*moments: tuple[float, float]) -> Pace:
    pace = Pace()
    for at, done in moments:
        pace.note(done, at)
    return pace


def test_pace_is_that_of_the_last_seconds() -> None:
    slow = [(float(at), float(at)) for at in range(100)]
    fast = [(100.0 + at, 100.0 + 10 * at) for at in range(60)]
    pace = told(*slow, *fast)
    assert pace.rate(159.0) == pytest.approx(10)
    assert pace.seconds_left(790.0, 159.0) == pytest.approx(10)


def test_nothing_is_said_of_work_that_has_just_begun() -> None:
    assert told().rate(1.0) is None
    assert told((5.0, 0.0)).rate(5.0) is None
    assert told((5.0, 0.0)).seconds_left(10.0, 5.0) is None


def test_work_that_stands_still_slows_down_and_has_no_time_left_to_tell() -> None:
    pace = told((0.0, 0.0), (1.0, 10.0))
    assert pace.rate(1.0) == pytest.approx(10)
    assert pace.rate(101.0) == pytest.approx(0.1, rel=0.02)
    assert told((0.0, 3.0), (9.0, 3.0)).seconds_left(10.0, 9.0) is None


def test_time_left_passes_between_two_words() -> None:
    pace = told((0.0, 0.0), (10.0, 50.0))
    assert pace.seconds_left(100.0, 10.0, pause_seconds=20.0) == pytest.approx(10)
    assert pace.seconds_left(100.0, 14.0, pause_seconds=20.0) == pytest.approx(6)
    assert pace.seconds_left(100.0, 30.0, pause_seconds=20.0) == 0.0
    assert pace.seconds_left(None, 14.0) is None


def test_work_that_begins_anew_has_a_new_pace() -> None:
    pace = told((0.0, 0.0), (10.0, 1000.0), (11.0, 0.0), (13.0, 4.0))
    assert pace.rate(13.0) == pytest.approx(2)


def test_memory_of_a_pace_is_bounded() -> None:
    pace = told(*((0.001 * each, float(each)) for each in range(100_000)))
    assert len(pace._moments) <= PACE_SECONDS + 2
