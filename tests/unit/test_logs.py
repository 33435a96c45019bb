import io
import json
import logging
import os
import re
import sys
import warnings
from datetime import UTC, datetime, timedelta
from threading import Thread

import pytest
import structlog

from ecavg.common import cli, logs
from ecavg.common.errors import UsageError
from ecavg.common.logs import configure_logging
from tests.unit.terminal import logged, on_a_terminal


def test_log_off_a_terminal_is_one_json_object_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    structlog.get_logger().info("round_opened", round=3, note="two\nlines")

    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    event = json.loads(line)
    at = datetime.fromisoformat(event.pop("timestamp"))
    assert event == {"event": "round_opened", "level": "info", "round": 3, "note": "two\nlines"}
    assert at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)


def test_log_on_a_terminal_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    configure_logging()
    structlog.get_logger().info("round_opened", round=3)

    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert "round_opened" in plain
    assert "round=3" in plain
    assert "{" not in plain


def test_log_goes_where_stderr_points_at_that_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(as_json=True)
    log = structlog.get_logger().bind(agent_id="edge-1")
    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stderr", replaced)
    log.info("joined")

    assert json.loads(replaced.getvalue())["agent_id"] == "edge-1"
    assert capsys.readouterr().err == ""


def test_log_carries_what_the_context_binds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    with structlog.contextvars.bound_contextvars(round=2, agent_id="edge-1"):
        structlog.get_logger().warning("upload_broken")

    (event,) = logged(capsys)
    assert (event["round"], event["agent_id"], event["level"]) == (2, "edge-1", "warning")


def test_log_leaves_out_what_is_below_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="warning")
    log = structlog.get_logger()
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")

    assert [event["event"] for event in logged(capsys)] == ["c", "d"]


def test_unknown_log_level_is_a_usage_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'loud': choose debug, info, warning, error"):
        configure_logging(level="loud")


def test_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="debug")
    library = logging.getLogger("some.library")
    library.info("chatter")
    library.warning("disk %s is nearly full", "/var")

    (event,) = logged(capsys)
    assert event["event"] == "disk /var is nearly full"
    assert (event["level"], event["logger"]) == ("warning", "some.library")


def test_python_warnings_are_log_events(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        configure_logging()
        warnings.simplefilter("always")
        warnings.warn("old option", stacklevel=1)
        logging.captureWarnings(False)

    (event,) = logged(capsys)
    assert "old option" in event["event"]
    assert event["logger"] == "py.warnings"


@pytest.mark.parametrize("as_json", [True, False])
def test_log_of_an_exception_has_its_traceback_but_no_local_variables(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(as_json=as_json)
    try:
        secret = "s3" + "cret"
        raise ValueError(f"no good: {len(secret)}")
    except ValueError:
        structlog.get_logger().exception("job_failed")

    err = capsys.readouterr().err
    assert "ValueError: no good: 6" in err
    assert "s3cret" not in err
    assert len(err.splitlines()) == 1 or not as_json


def test_process_binds_fields_for_all_its_threads_and_an_event_may_have_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("info", "json", quiet=False)
    logs.bind(agent_id="edge-1", round=1)
    logs.bind(round=2)
    thread = Thread(target=lambda: structlog.get_logger().info("trained"))
    thread.start()
    thread.join()
    structlog.get_logger().info("agent_reported", agent_id="edge-2")
    with structlog.contextvars.bound_contextvars(agent_id="edge-3"):
        structlog.get_logger().info("refused")
    found = [(event["event"], event["agent_id"], event["round"]) for event in logged(capsys)]
    assert found == [("trained", "edge-1", 2), ("agent_reported", "edge-2", 2), ("refused", "edge-3", 2)]


def test_json_format_makes_an_event_of_every_line_of_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json", quiet=False)
    cli.warn("edge-agent", "the clock is wrong")
    assert cli.fail("edge-agent", UsageError("no such folder")) == 2
    found = [(event["level"], event["text"]) for event in logged(capsys)]
    assert found == [
        ("warning", "edge-agent: WARNING: the clock is wrong"),
        ("error", "edge-agent: no such folder"),
    ]


def test_text_format_is_for_people_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "text", quiet=False)
    structlog.get_logger().info("round_opened", round=3)
    cli.warn("edge-agent", "the clock is wrong")
    first, second = capsys.readouterr().err.splitlines()
    assert "round_opened" in first
    assert "round=3" in first
    assert "\x1b" not in first
    assert second == "edge-agent: WARNING: the clock is wrong"


@pytest.mark.parametrize(("level", "shown"), [("debug", ["c", "d"]), ("error", ["d"])])
def test_quiet_leaves_warnings_and_errors(
    level: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up(level, "auto", quiet=True)
    log = structlog.get_logger()
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [event["event"] for event in logged(capsys)] == shown


def test_json_log_has_no_words_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(as_json=True)
    structlog.get_logger().info("step", loss=float("nan"), history=[1.0, float("inf")])

    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (event["loss"], event["history"]) == (None, [1.0, None])


def test_json_log_of_a_path_that_is_not_utf8_can_be_written_in_utf8(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = os.fsdecode("/Übung".encode("latin-1"))
    configure_logging()
    structlog.get_logger().info("read", first=path, counts={path: 1})
    line = capsys.readouterr().err
    event = json.loads(line)
    assert (event["first"], event["counts"]) == (r"/\xdcbung", {r"/\xdcbung": 1})
    assert r"\udcdc" not in line
