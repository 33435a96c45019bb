"""The log, the progress display, the metrics and the HTTP endpoints of a process."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import json
import logging
import math
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import structlog
import uvicorn
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import streams
from common.addresses import Address
from common.config import is_loopback
from common.errors import UsageError, encodable, one_line
from common.files import read_text, replacing

LOG_LEVELS = ("debug", "info", "warning", "error")
# Two "progress" events of one label are at least so far apart.
LOGGED_PROGRESS_SECONDS = 5.0
# A long-running process uses ever new labels. Only the state of the latest labels is kept.
KEPT_LABELS = 32
# When a new bar begins, a bar that has not moved for this time becomes a finished line.
STANDSTILL_SECONDS = 1.0
# The HTTP server has at most so many open connections. For a new one beyond, it closes the oldest.
HTTP_CONNECTIONS = 128
# A connection that does not begin another request within this time is closed.
REQUEST_SECONDS = 10.0
MAX_REQUEST_HEAD_BYTES = 16 * 1024
# When the HTTP server stops, a response in flight may take this time.
STOP_SECONDS = 2

# The token of the HTTP endpoints has at least so many characters.
MIN_TOKEN_LENGTH = 16

_Endpoint = Callable[[Request], Awaitable[Response]]
_T = TypeVar("_T")


# --- log ---------------------------------------------------------------------------------------------


def configure_logging(*, level: str = "info", as_json: bool | None = None) -> None:
    """Set up the log, which goes to stderr. A line that cannot be written is dropped: see common/streams.py.

    Each line has an event name, its fields, the UTC time and the fields that `structlog.contextvars` binds.
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
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]


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


def _to_json(value: Any, **options: Any) -> str:
    """Return strict JSON: null replaces NaN and the infinities, and all text can be written in UTF-8."""
    return json.dumps(_for_json(value), allow_nan=False, **options)


def _for_json(value: Any) -> Any:
    """Return the value with what strict JSON does not have replaced, at any depth."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {_for_json(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return value


# --- progress ----------------------------------------------------------------------------------------


class ProgressDisplay(Protocol):
    """A display of the progress of each labelled piece of work, at the terminal or in the log.

    Any thread may call the methods.
    """

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` units of `label` are finished, and beside them the text `detail`.

        The work is finished when `done` equals `total`.
        """

    def message(self, text: str) -> None:
        """Print one line that stays on the terminal."""

    def close(self) -> None:
        """Restore the terminal; a second call does nothing."""


def progress_display() -> ProgressDisplay:
    """Return a display with bars if stderr is a terminal, otherwise one that logs "progress" events."""
    return _ProgressBars() if sys.stderr.isatty() else _ProgressLog()


class _LatestLabels(dict[str, _T]):
    """A dict that keeps only the KEPT_LABELS labels that were set last."""

    def __setitem__(self, label: str, value: _T) -> None:
        self.pop(label, None)
        super().__setitem__(label, value)
        if len(self) > KEPT_LABELS:
            del self[next(iter(self))]


class _ProgressBars:
    """A display with one live bar for each label under way.

    A bar that is finished, or stands still when another bar begins, becomes a line above the live bars.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            # What is printed to a file must not go to the terminal.
            redirect_stdout=sys.stdout.isatty(),
        )
        # The time beside each bar is that of its last movement.
        self._bars: dict[str, tuple[TaskID, float]] = {}
        self._latest: dict[str, tuple[float, float]] = _LatestLabels()
        self._lock = threading.Lock()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Move the label's bar, and turn the bar into a line when the work is finished."""
        with self._lock:
            # A repeated update would print a finished bar twice.
            if self._latest.get(label) == (done, total):
                return
            self._latest[label] = (done, total)
            self._move_bar(label, done, total, detail)
            if done >= total:
                self._turn_into_line(label)

    def _move_bar(self, label: str, done: float, total: float, detail: str) -> None:
        """Draw the label's bar; a new bar first ends the bars that stand still."""
        now = self._clock()
        if label in self._bars:
            task_id, _ = self._bars[label]
        else:
            for other in [
                name for name, (_, moved_at) in self._bars.items() if now - moved_at >= STANDSTILL_SECONDS
            ]:
                self._turn_into_line(other)
            self._progress.start()
            task_id = self._progress.add_task(label, total=total, detail=detail)
        self._progress.update(task_id, completed=done, total=total, detail=detail)
        self._bars[label] = (task_id, now)

    def _turn_into_line(self, label: str) -> None:
        """Print the bar as it is now as a line above the live bars, and remove it from them."""
        task_id, _ = self._bars.pop(label)
        bar = [task for task in self._progress.tasks if task.id == task_id]
        self._progress.console.print(self._progress.make_tasks_table(bar))
        self._progress.remove_task(task_id)

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        self._progress.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the live display."""
        self._progress.stop()


class _ProgressLog:
    """A display that logs an event for a label at once, then every few seconds, and when it is finished."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = structlog.get_logger()
        self._latest: dict[str, tuple[float, float]] = _LatestLabels()
        self._logged_at: dict[str, float] = _LatestLabels()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """Log the progress, if the work is finished or the label's last event is long enough ago."""
        if self._latest.get(label) == (done, total):
            return
        self._latest[label] = (done, total)
        now = self._clock()
        is_due = now - self._logged_at.get(label, -math.inf) >= LOGGED_PROGRESS_SECONDS
        if is_due or done >= total:
            self._logged_at[label] = now
            self._log.info("progress", label=label, done=done, total=total, detail=detail)

    def message(self, text: str) -> None:
        """Log the text as an event "message"."""
        self._log.info("message", text=text)

    def close(self) -> None:
        """Do nothing, because a log needs no end."""


# --- metrics -----------------------------------------------------------------------------------------


def make_registry() -> CollectorRegistry:
    """Return a registry with the metrics of any process: CPU seconds, memory, open files, lost log lines."""
    # Without this call, each counter would have a second series with the time of its creation.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(_DroppedLines())
    return registry


class _DroppedLines(Collector):
    """The metric of the log lines that this process could not write."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with its present value."""
        yield CounterMetricFamily(
            "ecavg_log_lines_dropped_total",
            "Lines that could not be written to stdout or stderr: full disk, closed, or no reader.",
            value=streams.num_dropped(),
        )


# --- HTTP --------------------------------------------------------------------------------------------


def http_token(host: str, file: Path | None, default: Path) -> str | None:
    """Return the token that callers of the HTTP endpoints must show, or None if no token is needed.

    A token is needed if a file is configured, or if the endpoints listen beyond the loopback interface. A
    file that does not exist is created with a new token.

    Args:
        host: the address on which the HTTP endpoints listen.
        file: the configured file with the token; None if there is none.
        default: the file that is used if none is configured and `host` is not loopback.

    Raises:
        UsageError: the file cannot be read or written, or its token is too short.
    """
    path = file or (None if is_loopback(host) else default)
    if path is None:
        return None
    try:
        if not path.exists():
            with replacing(path, mode=0o600) as partial:
                partial.write_text(secrets.token_urlsafe(32) + "\n", "utf-8")
    except OSError as error:
        raise UsageError(f"cannot use the token file {path}: {error.strerror}") from error
    lines = [line.strip() for line in read_text(path, "token file").splitlines() if line.strip()]
    if len(lines) > 1:
        raise UsageError(f"token file {path} has {len(lines)} lines: write one token there")
    token = "".join(lines)
    if len(token) < MIN_TOKEN_LENGTH:
        raise UsageError(
            f"the token in {path} is too short: write {MIN_TOKEN_LENGTH} characters or more there"
        )
    return token


def make_app(
    registry: CollectorRegistry,
    *,
    ready: Callable[[], bool],
    status: Callable[[], Awaitable[Mapping[str, Any]]],
    page: bytes | None,
    token: str | None = None,
) -> Starlette:
    """Return the application: `/api/status`, `/metrics`, `/healthz`, `/readyz`, and `/` if there is a page.

    Args:
        registry: the metrics to show.
        ready: returns True once `/readyz` should answer 200; before that `/readyz` answers 503.
        status: returns the object that `/api/status` sends as JSON; called for each request, on the event
            loop.
        page: an HTML file with inline script and style; the browser runs no other scripts. None for no page.
        token: the token for all paths but `/healthz` and `/readyz`; None leaves all paths open.
    """

    def guarded(path: str, endpoint: _Endpoint) -> Route:
        async def guard(request: Request) -> Response:
            if token is None or _carries(request, token):
                return await endpoint(request)
            text = "show the token: as the password, or with `Authorization: Bearer …`\n"
            return PlainTextResponse(text, 401, {"WWW-Authenticate": 'Basic realm="ECAvg"'})

        return Route(path, guard)

    async def api_status(_: Request) -> Response:
        return Response(
            _to_json(await status()), media_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", 503)

    routes = [
        guarded("/api/status", api_status),
        guarded("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ]
    if page is not None:
        routes.append(guarded("/", _page_endpoint(page)))
    return Starlette(routes=routes)


def _carries(request: Request, token: str) -> bool:
    """Return True if the request's Authorization header has the token.

    Programs send the scheme Bearer. Browsers ask their user for a name and a password, and send the scheme
    Basic; the token is the password, and any name will do.
    """
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(value.encode(), token.encode())


def _page_endpoint(page: bytes) -> _Endpoint:
    """Return an endpoint that answers with the page."""
    headers = {
        "Content-Security-Policy": _content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def index(_: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return index


def _content_security_policy(page: bytes) -> str:
    """Return a policy that allows only the page's own inline script and style, by their digests.

    Source: W3C Content Security Policy Level 3.
    """

    def digests(tag: bytes) -> str:
        bodies = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        hashed = (base64.b64encode(hashlib.sha256(body).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in hashed) or "'none'"

    return (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _BoundedProtocol(H11Protocol):
    """The HTTP protocol of uvicorn, with limits so that many or slow connections do not keep others out.

    uvicorn itself waits for ever for the rest of a request, and for a caller that does not read the answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection, and close the oldest connection if there are too many."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._last_request: object = None
        self._next_check = self.loop.call_later(REQUEST_SECONDS, self._check_progress)
        if len(self.connections) > HTTP_CONNECTIONS:
            oldest = min(self.connections, key=lambda each: getattr(each, "_since", 0.0))
            # `abort` ends the connection only later. Without this line, a connection that arrives in between
            # would find the same oldest one.
            self.connections.discard(oldest)
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cease to watch the connection."""
        self._next_check.cancel()
        super().connection_lost(exc)

    def _check_progress(self) -> None:
        """Close the connection if it has begun no other request since the last check."""
        if self.cycle is self._last_request:
            self.transport.abort()
            return
        self._last_request = self.cycle
        self._next_check = self.loop.call_later(REQUEST_SECONDS, self._check_progress)


class _QuietServer(uvicorn.Server):
    """A uvicorn server without signal handlers, because the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers of the process unchanged."""
        yield


class HttpServer:
    """An HTTP server that runs in the current event loop until `stop()`."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._server = server
        self._task = asyncio.create_task(server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Close the port; responses in flight have STOP_SECONDS to end."""
        self._server.should_exit = True
        await self._task


async def serve_http(app: Starlette, *, host: str, port: int) -> HttpServer:
    """Serve `app` on a port, which accepts connections from the moment when this function returns.

    Args:
        app: the application to serve.
        host: the address to listen on.
        port: the port to listen on; 0 picks a free one.

    Raises:
        UsageError: the server cannot listen on the address and port.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        # Otherwise uvicorn takes the number from WEB_CONCURRENCY, which is meant for other programs.
        workers=1,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=_BoundedProtocol,
        h11_max_incomplete_event_size=MAX_REQUEST_HEAD_BYTES,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return HttpServer(_QuietServer(config), listener)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address and port, or raise UsageError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {Address(host, port)}: {error.strerror};"
            " choose another address or port, or port 0 for a free one"
        ) from error
    return listener
