"""The log of a process: events with fields, one a line on stderr, as JSON or for people."""

import io
import logging
import sys
from typing import Any, Literal, TextIO

import structlog

from ecavg.common import cli
from ecavg.common.errors import UsageError, one_line
from ecavg.common.strict_json import to_json

LOG_LEVELS = ("debug", "info", "warning", "error")

LogFormat = Literal["auto", "text", "json"]

# The fields of every event from now on, unless the event itself has others.
_bound: dict[str, Any] = {}


def set_up(level: str, log_format: LogFormat, *, quiet: bool) -> None:
    """Set up the log of a process as its configuration says.

    With the format "json" every line of stderr is an event, the last error included.

    Args:
        quiet: True to leave out what is no warning and no error.
    """
    if quiet and level != "error":
        level = "warning"
    configure_logging(level=level, as_json={"auto": None, "text": False, "json": True}[log_format])
    cli.complain_by(_log_line if log_format == "json" else None)


def bind(**fields: Any) -> None:
    """Have every event of this process carry these fields, in all its threads."""
    _bound.update(fields)


def unbind() -> None:
    """Have no event carry fields of the process any more."""
    _bound.clear()


def _log_line(level: str, text: str) -> None:
    structlog.get_logger().log(logging.getLevelNamesMapping()[level.upper()], "message", text=text)


def _with_bound(_: Any, __: str, event: Any) -> Any:
    return _bound | event


def configure_logging(*, level: str = "info", as_json: bool | None = None) -> None:
    """Set up the log, which goes to stderr. A line that cannot be written is dropped: see common/streams.py.

    Each line has an event name, its fields, the UTC time, what `structlog.contextvars` binds, and what `bind`
    does.
    The log also shows Python's warnings, and what libraries log through `logging` from "warning" on.

    Args:
        level: the lowest of LOG_LEVELS that is shown.
        as_json: True for one JSON object per line, False for lines to read at a terminal. None stands for
            JSON unless stderr is a terminal.

    Raises:
        UsageError: the level is unknown.
    """
    if level not in LOG_LEVELS:
        raise UsageError(f"unknown log level {level!r}: choose {', '.join(LOG_LEVELS)}")
    if as_json is None:
        as_json = not sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _with_bound,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(_json_renderers() if as_json else _console_renderers()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_StderrLogger,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


class _StderrLogger:
    """A logger that looks up sys.stderr for each line, because a progress display replaces sys.stderr."""

    def __init__(self, *_: object) -> None: ...

    def msg(self, line: str) -> None:
        """Write the line to stderr."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    debug = info = warning = error = critical = msg


class _ToStructlog(logging.Handler):
    """A handler that passes the log records of libraries on to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record as a structlog event."""
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)


def _json_renderers() -> list[Any]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=to_json)]


def _console_renderers() -> list[Any]:
    renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_write_traceback)
    return [_make_printable, renderer]


def _make_printable(_: Any, __: str, event: Any) -> Any:
    """Replace the unprintable characters in a log event, because a stranger's text could control a terminal.

    The JSON renderer does not need this function, because JSON escapes such characters.
    """
    return {key: one_line(value) if isinstance(value, str) else value for key, value in event.items()}


def _write_traceback(stream: TextIO, error: Any) -> None:
    """Write a traceback without the local variables of each frame, which structlog shows by default."""
    lines = io.StringIO()
    structlog.dev.plain_traceback(lines, error)
    stream.write("\n".join(one_line(line) for line in lines.getvalue().split("\n")))
