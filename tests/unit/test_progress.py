import os
import pty
import re
import sys

import pytest
import structlog

from ecavg.common import cli, progress, rpc
from ecavg.common.errors import UsageError
from ecavg.common.logs import configure_logging
from ecavg.common.progress import LongWork, progress_display
from tests.unit.terminal import final_lines, logged, on_a_terminal


def test_progress_off_a_terminal_is_logged_at_once_then_every_five_seconds_and_at_the_end() -> None:
    now = 0.0
    display = progress._ProgressLog(clock=lambda: now)
    with structlog.testing.capture_logs() as events:
        for step in range(1, 125):
            now = step * 0.1
            display.update("pre-training", step, 124)
    display.close()

    assert [event["done"] for event in events] == [1, 51, 101, 124]
    assert {event["event"] for event in events} == {"progress"}


def test_progress_of_two_labels_is_logged_apart() -> None:
    display = progress._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs() as events:
        display.update("weights", 1, 10)
        display.update("data", 1, 10, "3 MB/s")
        display.update("weights", 2, 10)

    assert [(event["label"], event["detail"]) for event in events] == [("weights", ""), ("data", "3 MB/s")]


def test_finished_progress_told_twice_is_logged_once() -> None:
    display = progress._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs() as events:
        display.update("weights", 10, 10)
        display.update("weights", 10, 10)

    assert len(events) == 1


def test_labels_of_long_ago_are_forgotten() -> None:
    display = progress._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs():
        for number in range(100):
            display.update(f"round {number}", 1, 2)  # never finished: it broke off
            display.update(f"round {number}", 2, 2)
    assert len(display._latest) == len(display._logged_at) == progress.KEPT_LABELS
    assert "round 99" in display._latest


def test_bars_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    display = progress._ProgressBars()
    for number in range(100):
        display.update(f"round {number}", 2, 2)
    display.close()
    assert len(display._latest) == progress.KEPT_LABELS
    assert not display._bars


def test_progress_off_a_terminal_writes_log_events_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    display = progress_display()
    display.update("fine-tuning", 1, 2)
    display.message("round 1 is published")
    display.close()

    assert [event["event"] for event in logged(capsys)] == ["progress", "message"]


def test_finished_bar_stays_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    display = progress_display()
    display.update("pre-training", 1, 2, "loss 0.9")
    display.update("pre-training", 2, 2, "loss 0.5")
    display.update("pre-training", 2, 2, "loss 0.5")
    display.close()

    finished = [line for line in final_lines(terminal) if "100%" in line]
    assert len(finished) == 1
    assert finished[0].startswith("pre-training")
    assert finished[0].endswith("loss 0.5")


def test_bar_that_stands_still_makes_room_and_bars_that_move_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    now = 0.0
    display = progress._ProgressBars(clock=lambda: now)
    display.update("contributions", 2, 5)
    now = 10.0
    display.update("weights", 1, 2)
    display.update("data", 1, 2)
    assert [task.description for task in display._progress.tasks] == ["weights", "data"]
    display.close()

    assert [line for line in final_lines(terminal) if line.startswith("contributions")]


def test_message_and_log_lines_stand_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    configure_logging()
    display = progress_display()
    display.update("weights", 1, 2)
    display.message("[bold] is not markup")
    structlog.get_logger().info("reconnected")
    display.close()

    lines = final_lines(terminal)
    assert "[bold] is not markup" in lines
    assert any("reconnected" in line and "%" not in line for line in lines)
    assert sys.stderr is terminal


def test_closing_a_display_twice_or_unused_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    display = progress_display()
    display.close()
    display.close()
    assert terminal.getvalue() == ""


STRANGE = "x\x1b[2J\x9b1m\r\n\u202egnp.exe\u2028cloud-server ready"


def test_strangers_text_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    configure_logging(level="info", as_json=False)
    try:
        raise ValueError(STRANGE)
    except ValueError:
        structlog.get_logger().exception(STRANGE, reason=STRANGE, several=[STRANGE])
    display = progress_display()
    display.message(STRANGE)
    display.close()
    print(rpc.plain(STRANGE), file=sys.stderr)
    cli.fail("edge-agent", UsageError(STRANGE))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())  # the log's own colours
    assert shown.count("gnp.exe") >= 6
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", shown)
    assert not [line for line in shown.splitlines() if line.startswith("cloud-server ready")]


def test_a_pseudo_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal_fd = pty.openpty()
    with os.fdopen(controller, "rb", 0), os.fdopen(terminal_fd, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert isinstance(progress_display(), progress._ProgressBars)


def test_bars_show_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    now = 0.0
    display = progress._ProgressBars(clock=lambda: now)
    display._progress.get_time = lambda: now
    for now in range(5):
        display.update("upload weights", now * 1_000_000, 10_000_000, unit="bytes")
    # The display is drawn by a thread of its own, now and then.
    display._progress.refresh()
    display.close()
    last = [line for line in final_lines(terminal) if line.startswith("upload weights")][-1]
    assert re.search(r" 40% 0:00:06 1.0 MB/s$", last)


def test_log_of_progress_has_rate_and_time_left() -> None:
    now = 0.0
    display = progress._ProgressLog(clock=lambda: now)
    with structlog.testing.capture_logs() as events:
        for now in (0.0, 6.0):
            display.update("pre-training", 10 * now, 100, unit="steps")
    assert [(event["rate"], event["seconds_left"]) for event in events] == [(None, None), (10.0, 4.0)]
    assert events[0]["unit"] == "steps"


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (1_234_567.0, "bytes", "1.2 MB/s"),
        (0.4, "bytes", "0 bytes/s"),
        (35.4, "steps", "35 steps/s"),
        (0.254, "steps", "0.25 steps/s"),
    ],
)
def test_rates_are_for_people(rate: float, unit: str, text: str) -> None:
    assert progress.rate_text(rate, unit) == text


def test_json_and_quiet_have_no_bars_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    assert isinstance(progress_display(has_bars=False), progress._ProgressLog)


def test_work_that_is_mostly_short_has_a_bar_only_where_it_is_long() -> None:
    now = 0.0
    shown: list[tuple[float, float]] = []

    class Bars(progress._ProgressLog):
        def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "") -> None:
            shown.append((done, total))

    work = LongWork(Bars(), "evaluating", clock=lambda: now)
    for done in (1, 2, 3):
        work.update(done, 3)
    assert shown == []
    for moment, done in ((10.0, 1), (10.5, 2), (11.0, 3), (12.0, 4)):
        now = moment
        work.update(done, 4)
    assert shown == [(3, 4), (4, 4)]
    work.update(4, 4)
    assert shown == [(3, 4), (4, 4)]
