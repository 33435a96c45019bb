import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import pty
import re
import signal
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from common import cli, rpc, telemetry
from common.errors import UsageError
from common.telemetry import configure_logging, make_app, make_registry, progress_display, serve_http


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr by a terminal, and return the terminal.

    This is no fixture, because pytest sets stderr anew between a fixture and its test.
    """
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


# --- log ---------------------------------------------------------------------------------------------


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


def test_json_log_has_no_words_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(as_json=True)
    structlog.get_logger().info("step", loss=float("nan"), history=[1.0, float("inf")])

    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (event["loss"], event["history"]) == (None, [1.0, None])


# --- progress ----------------------------------------------------------------------------------------


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


def test_progress_off_a_terminal_is_logged_at_once_then_every_five_seconds_and_at_the_end() -> None:
    now = 0.0
    display = telemetry._ProgressLog(clock=lambda: now)
    with structlog.testing.capture_logs() as events:
        for step in range(1, 125):
            now = step * 0.1
            display.update("pre-training", step, 124)
    display.close()

    assert [event["done"] for event in events] == [1, 51, 101, 124]
    assert {event["event"] for event in events} == {"progress"}


def test_progress_of_two_labels_is_logged_apart() -> None:
    display = telemetry._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs() as events:
        display.update("weights", 1, 10)
        display.update("data", 1, 10, "3 MB/s")
        display.update("weights", 2, 10)

    assert [(event["label"], event["detail"]) for event in events] == [("weights", ""), ("data", "3 MB/s")]


def test_finished_progress_told_twice_is_logged_once() -> None:
    display = telemetry._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs() as events:
        display.update("weights", 10, 10)
        display.update("weights", 10, 10)

    assert len(events) == 1


def test_labels_of_long_ago_are_forgotten() -> None:
    display = telemetry._ProgressLog(clock=lambda: 0.0)
    with structlog.testing.capture_logs():
        for number in range(100):
            display.update(f"round {number}", 1, 2)  # never finished: it broke off
            display.update(f"round {number}", 2, 2)
    assert len(display._latest) == len(display._logged_at) == telemetry.KEPT_LABELS
    assert "round 99" in display._latest


def test_bars_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    display = telemetry._ProgressBars()
    for number in range(100):
        display.update(f"round {number}", 2, 2)
    display.close()
    assert len(display._latest) == telemetry.KEPT_LABELS
    assert not display._bars


def test_progress_off_a_terminal_writes_log_events_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    display = progress_display()
    display.update("fine-tuning", 1, 2)
    display.message("round 1 is published")
    display.close()

    assert [event["event"] for event in logged(capsys)] == ["progress", "message"]


def final_lines(terminal: Terminal) -> list[str]:
    """Return the lines that stay visible, without styles and without erased lines."""
    plain = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", terminal.getvalue())
    shown = [line.split("\x1b[2K")[-1].split("\x1b[1A")[-1] for line in plain.split("\n")]
    return [line.strip("\r ") for line in shown]


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
    display = telemetry._ProgressBars(clock=lambda: now)
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
        assert isinstance(progress_display(), telemetry._ProgressBars)


# --- HTTP --------------------------------------------------------------------------------------------

PAGE = b"<!doctype html><style>p { color: teal }</style><p>hi</p><script>\nlet a = 1;\n</script>"


class Process:
    """Stands in for what a server or an agent tells about itself."""

    def __init__(self) -> None:
        self.registry = make_registry()
        self.is_ready = False
        self.status: dict[str, Any] = {"round": 1}

    async def read_status(self) -> dict[str, Any]:
        return self.status

    def app(self, page: bytes | None = PAGE, token: str | None = None) -> Starlette:
        return make_app(
            self.registry, ready=lambda: self.is_ready, status=self.read_status, page=page, token=token
        )


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
async def client(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client
    await server.stop()


async def test_who_does_not_show_the_token_learns_only_that_the_process_lives(process: Process) -> None:
    server = await serve_http(process.app(token="correct horse battery"), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        bearer = {"Authorization": "Bearer correct horse battery"}
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct horse battery"}]
        wrong += [{"Authorization": "Basic ☃"}, {"Authorization": "Bearer"}]
        for path in ("/", "/api/status", "/metrics"):
            for headers in wrong:
                encoded = {name: value.encode() for name, value in headers.items()}
                reply = await client.get(path, headers=encoded)
                assert reply.status_code == 401
                assert reply.headers["www-authenticate"].startswith("Basic ")  # the browser asks for it
            assert (await client.get(path, headers=bearer)).status_code == 200
            assert (await client.get(path, auth=("anyone", "correct horse battery"))).status_code == 200
            assert (await client.get(path, auth=("anyone", "wrong"))).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
    await server.stop()


def test_beyond_loopback_there_is_always_a_token(tmp_path: Path) -> None:
    default, file = tmp_path / "default", tmp_path / "file"
    for host in ("127.0.0.1", "::1", "localhost"):
        assert telemetry.http_token(host, None, default) is None
    made = {telemetry.http_token(host, None, default) for host in ("0.0.0.0", "::", "example.org")}
    assert made == {default.read_text("utf-8").strip()}  # it stays the same
    assert default.stat().st_mode & 0o777 == 0o600
    assert telemetry.http_token("127.0.0.1", file, default) == file.read_text("utf-8").strip()
    file.write_text("short\n", "utf-8")
    with pytest.raises(UsageError, match="is too short: write 16 characters"):
        telemetry.http_token("127.0.0.1", file, default)
    with pytest.raises(UsageError, match="cannot read token file"):
        telemetry.http_token("127.0.0.1", tmp_path, default)


async def test_readyz_answers_503_until_ready_and_healthz_at_once(
    process: Process, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    process.is_ready = True
    assert (await client.get("/readyz")).status_code == 200


async def test_status_is_asked_for_each_time_and_never_cached(
    process: Process, client: httpx.AsyncClient
) -> None:
    process.status = {"round": 1, "progress": {"loss": float("nan")}, "agents": ({"slot": 1},)}
    reply = await client.get("/api/status")
    assert reply.json() == {"round": 1, "progress": {"loss": None}, "agents": [{"slot": 1}]}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"

    process.status = {"round": 2}
    assert (await client.get("/api/status")).json() == {"round": 2}


async def test_metrics_are_the_process_own_and_the_registry_s(
    process: Process, client: httpx.AsyncClient
) -> None:
    Counter("sent_bytes_total", "Sent.", registry=process.registry).inc(3)
    reply = await client.get("/metrics")

    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    (sample,) = families["sent_bytes"].samples
    assert (sample.name, sample.value) == ("sent_bytes_total", 3)
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert "python_info" in families
    assert reply.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_come_as_openmetrics_to_who_asks(client: httpx.AsyncClient) -> None:
    reply = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


async def test_page_may_run_its_own_script_and_style_and_no_other(client: httpx.AsyncClient) -> None:
    reply = await client.get("/")
    assert reply.content == PAGE
    assert reply.headers["content-type"] == "text/html; charset=utf-8"

    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    script = base64.b64encode(hashlib.sha256(b"\nlet a = 1;\n").digest()).decode()
    style = base64.b64encode(hashlib.sha256(b"p { color: teal }").digest()).decode()
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == f"'sha256-{script}'"
    assert policy["style-src"] == f"'sha256-{style}'"
    assert policy["connect-src"] == "'self'"


def test_status_page_needs_no_other_file_and_turns_no_data_into_markup() -> None:
    page = resources.files("cloud_server").joinpath("web/index.html").read_text("utf-8")
    addresses = set(re.findall(r"https?:[^\s'\"]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert not re.search(r"<(script|style)\s|\sstyle=|\son[a-z]+=", page)  # its policy would block them


async def test_process_without_a_page_has_none(process: Process) -> None:
    transport = httpx.ASGITransport(process.app(page=None))
    async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/api/status")).status_code == 200


async def test_port_in_use_is_a_usage_error_that_names_it(process: Process) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: Address already in use; choose another"):
            await serve_http(process.app(), host="127.0.0.1", port=port)


async def test_address_of_another_machine_is_a_usage_error(process: Process) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await serve_http(process.app(), host="192.0.2.1", port=0)


async def test_stopped_server_frees_its_port_and_leaves_signals_alone(process: Process) -> None:
    before = signal.getsignal(signal.SIGTERM)
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(trust_env=False) as client:  # its connection is still open at stop()
        await client.get(f"http://127.0.0.1:{server.port}/healthz")
        assert signal.getsignal(signal.SIGTERM) is before
        async with asyncio.timeout(5):
            await server.stop()
    again = await serve_http(process.app(), host="127.0.0.1", port=server.port)
    assert again.port == server.port
    await again.stop()


async def test_server_stopped_before_its_first_request_stops(process: Process) -> None:
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with asyncio.timeout(5):
        await server.stop()
