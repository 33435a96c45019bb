"""What an operator sees of a process: its log, its progress, its metrics and its status page."""

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
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.config import is_loopback
from common.errors import UsageError, one_line
from common.files import replacing

LOG_LEVELS = ("debug", "info", "warning", "error")
LOGGED_PROGRESS_SECONDS = 5.0  # the shortest time between two "progress" events of one label
KEPT_LABELS = 32  # a process that runs for ever has ever new labels: old ones are forgotten
STANDSTILL_SECONDS = 1.0  # a bar that has not moved for so long makes room for a new one
HTTP_CONNECTIONS = 128  # at once; for one more the oldest makes room
REQUEST_SECONDS = 10.0  # in which a connection must come to another request
MAX_REQUEST_HEAD_BYTES = 16 * 1024
STOP_SECONDS = 2  # how long a response in flight may take when the HTTP server stops

MIN_TOKEN_LENGTH = 16  # of the HTTP endpoints' token

_Endpoint = Callable[[Request], Awaitable[Response]]
_T = TypeVar("_T")


# --- log ---------------------------------------------------------------------------------------------


def configure_logging(*, level: str = "info", as_json: bool | None = None) -> None:
    """Log to stderr: one event name plus fields, UTC time, whatever `structlog.contextvars` binds.

    Libraries that log through `logging`, and Python's own warnings, appear in it from "warning" on.

    Args:
        level: the lowest of LOG_LEVELS that is shown.
        as_json: one JSON object a line; None: yes unless stderr is a terminal.

    Raises:
        UsageError: unknown level.
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
    """Writes to whatever sys.stderr is at that moment: a progress display replaces it while it is shown."""

    def __init__(self, *_: object) -> None: ...

    def msg(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    debug = info = warning = error = critical = msg


class _ToStructlog(logging.Handler):
    """Passes a library's log record on as a structlog event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)


def _json_renderers() -> list[Any]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]


def _console_renderers() -> list[Any]:
    renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_show_traceback)
    return [_in_one_line, renderer]


def _in_one_line(_: Any, __: str, event: Any) -> Any:
    """What strangers wrote must not command the terminal; JSON has escapes for it."""
    return {key: one_line(value) if isinstance(value, str) else value for key, value in event.items()}


def _show_traceback(stream: TextIO, error: Any) -> None:
    """Without the local variables of every frame, which are structlog's default."""
    lines = io.StringIO()
    structlog.dev.plain_traceback(lines, error)
    stream.write("\n".join(one_line(line) for line in lines.getvalue().split("\n")))


def _to_json(value: Any, **options: Any) -> str:
    """Strict JSON: what is not a finite number becomes null, as JSON has no word for it."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# --- progress ----------------------------------------------------------------------------------------


class ProgressDisplay(Protocol):
    """Shows how far each labelled piece of work is, at the terminal or in the log; for any thread."""

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` units of `label` are finished; all of them when they are equal."""

    def message(self, text: str) -> None:
        """Say one line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was; harmless when done twice."""


def progress_display() -> ProgressDisplay:
    """Bars when stderr is a terminal, otherwise "progress" events in the log."""
    return _ProgressBars() if sys.stderr.isatty() else _ProgressLog()


class _Recent(dict[str, _T]):
    """Keeps the KEPT_LABELS labels that were set last."""

    def __setitem__(self, label: str, value: _T) -> None:
        self.pop(label, None)
        super().__setitem__(label, value)
        if len(self) > KEPT_LABELS:
            del self[next(iter(self))]


class _ProgressBars:
    """A live bar for each label that is under way; one that is finished, or stood still when
    another began, stays behind as a line above.
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
        )
        self._bars: dict[str, tuple[TaskID, float]] = {}  # and when it last moved
        self._latest: dict[str, tuple[float, float]] = _Recent()
        self._lock = threading.Lock()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        with self._lock:
            if self._latest.get(label) == (done, total):
                return  # news that is no news would print a finished bar twice
            self._latest[label] = (done, total)
            self._draw(label, done, total, detail)
            if done >= total:
                self._leave_behind(label)

    def _draw(self, label: str, done: float, total: float, detail: str) -> None:
        now = self._clock()
        if label in self._bars:
            task_id, _ = self._bars[label]
        else:
            for other in [name for name, (_, at) in self._bars.items() if now - at >= STANDSTILL_SECONDS]:
                self._leave_behind(other)
            self._progress.start()
            task_id = self._progress.add_task(label, total=total, detail=detail)
        self._progress.update(task_id, completed=done, total=total, detail=detail)
        self._bars[label] = (task_id, now)

    def _leave_behind(self, label: str) -> None:
        task_id, _ = self._bars.pop(label)
        bar = [task for task in self._progress.tasks if task.id == task_id]
        self._progress.console.print(self._progress.make_tasks_table(bar))
        self._progress.remove_task(task_id)

    def message(self, text: str) -> None:
        self._progress.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class _ProgressLog:
    """An event for each label at once, then every few seconds, and when it is finished."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = structlog.get_logger()
        self._latest: dict[str, tuple[float, float]] = _Recent()
        self._logged_at: dict[str, float] = _Recent()

    def update(self, label: str, done: float, total: float, detail: str = "") -> None:
        if self._latest.get(label) == (done, total):
            return
        self._latest[label] = (done, total)
        now = self._clock()
        due = now - self._logged_at.get(label, -math.inf) >= LOGGED_PROGRESS_SECONDS
        if due or done >= total:
            self._logged_at[label] = now
            self._log.info("progress", label=label, done=done, total=total, detail=detail)

    def message(self, text: str) -> None:
        self._log.info("message", text=text)

    def close(self) -> None: ...


# --- metrics -----------------------------------------------------------------------------------------


def make_registry() -> CollectorRegistry:
    """A registry of this process's own, which already tells its CPU seconds, memory and open files."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # would add a series to each counter
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


# --- HTTP --------------------------------------------------------------------------------------------


def http_token(host: str, file: Path | None, default: Path) -> str | None:
    """What callers of the HTTP endpoints have to show: nothing on loopback, unless there is a file.

    Args:
        file: where the token is, or is put when there is none yet.
        default: the file beyond loopback.

    Raises:
        UsageError: the file cannot be used.
    """
    path = file or (None if is_loopback(host) else default)
    if path is None:
        return None
    try:
        if not path.exists():
            with replacing(path, mode=0o600) as partial:
                partial.write_text(secrets.token_urlsafe(32) + "\n", "utf-8")
        token = path.read_text("utf-8").strip()
    except OSError as error:
        raise UsageError(f"cannot use the token file {path}: {error.strerror}") from error
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
    """`/api/status`, `/metrics`, `/healthz`, `/readyz`, and `/` where there is a page.

    Args:
        ready: whether `/readyz` answers 200; until then 503.
        status: the JSON behind the page; called for each request, on the event loop.
        page: an HTML file whose script and style are inline; the browser will run no others.
        token: who does not show it is told whether the process is alive and ready, and no more.
    """

    def guarded(path: str, endpoint: _Endpoint) -> Route:
        async def guard(request: Request) -> Response:
            if token is None or _shows(request, token):
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
        routes.append(guarded("/", _page(page)))
    return Starlette(routes=routes)


def _shows(request: Request, token: str) -> bool:
    """Bearer for programs; Basic, with any name, for browsers, which ask for it by themselves."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(value.encode(), token.encode())


def _page(page: bytes) -> _Endpoint:
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
    """Only the page's own inline script and style, by digest (W3C Content Security Policy Level 3)."""

    def digests(tag: bytes) -> str:
        bodies = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        hashed = (base64.b64encode(hashlib.sha256(body).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in hashed) or "'none'"

    return (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _BoundedProtocol(H11Protocol):
    """uvicorn's, but neither many connections nor slow ones keep others out.

    uvicorn itself waits for ever for the rest of a request, and for whoever does not read the answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._seen: object = None  # the request that was the latest one at the last look
        self._next_look = self.loop.call_later(REQUEST_SECONDS, self._look)
        if len(self.connections) > HTTP_CONNECTIONS:
            oldest = min(self.connections, key=lambda each: getattr(each, "_since", 0.0))
            self.connections.discard(oldest)  # now: it ends only later, and others come before that
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self.cycle is self._seen:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._next_look = self.loop.call_later(REQUEST_SECONDS, self._look)


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers: the process that embeds it has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An HTTP server that runs in the current event loop until `stop()`."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._server = server
        self._task = asyncio.create_task(server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Close the port, after the responses in flight or STOP_SECONDS."""
        self._server.should_exit = True
        await self._task


async def serve_http(app: Starlette, *, host: str, port: int) -> HttpServer:
    """Serve `app`; connections are accepted from the moment this returns. Port 0 picks a free one.

    Raises:
        UsageError: the address cannot be listened on.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
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
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror};"
            " choose another address or port, or port 0 for a free one"
        ) from error
    return listener
