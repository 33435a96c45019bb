"""The HTTP endpoints of a process: status, metrics, health, and those that the process adds."""

import asyncio
import base64
import contextlib
import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ecavg.common.addresses import Address, is_loopback
from ecavg.common.errors import UsageError
from ecavg.common.files import read_text, replacing
from ecavg.common.strict_json import to_json

# The HTTP server has at most so many open connections. For a new one beyond, it closes the oldest.
HTTP_CONNECTIONS = 128
# A connection that does not begin another request within this time is closed.
REQUEST_SECONDS = 10.0
# An answer that takes longer, such as a file or a stream of events, may stand still for so many checks of
# REQUEST_SECONDS each while its caller does not read.
STANDSTILL_CHECKS = 6
MAX_REQUEST_HEAD_BYTES = 16 * 1024
# When the HTTP server stops, a response in flight may take this time.
STOP_SECONDS = 2

# The token of the HTTP endpoints has at least so many characters.
MIN_TOKEN_LENGTH = 16

Endpoint = Callable[[Request], Awaitable[Response]]


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
    return read_secret(path, "token")


def read_secret(path: Path, noun: str) -> str:
    """Return the one secret in a file.

    Args:
        path: the path of the file.
        noun: the name of the secret in messages, for example "token".

    Raises:
        UsageError: the file cannot be read, has more lines, or its secret is too short.
    """
    lines = [line.strip() for line in read_text(path, f"{noun} file").splitlines() if line.strip()]
    if len(lines) > 1:
        raise UsageError(f"{noun} file {path} has {len(lines)} lines: write one {noun} there")
    secret = "".join(lines)
    if len(secret) < MIN_TOKEN_LENGTH:
        raise UsageError(
            f"the {noun} in {path} is too short: write {MIN_TOKEN_LENGTH} characters or more there"
        )
    return secret


def make_app(
    registry: CollectorRegistry,
    *,
    ready: Callable[[], bool],
    status: Callable[[], Awaitable[Mapping[str, Any]]],
    more: Mapping[str, Endpoint] = MappingProxyType({}),
    token: str | None = None,
) -> Starlette:
    """Return the application: `/api/status`, `/metrics`, `/healthz`, `/readyz`, and more.

    Args:
        registry: the metrics to show.
        ready: returns True once `/readyz` should answer 200; before that `/readyz` answers 503.
        status: returns the object that `/api/status` sends as JSON; called for each request, on the event
            loop.
        more: further endpoints by path, in Starlette's syntax.
        token: the token for all paths but `/healthz` and `/readyz`; None leaves all paths open.
    """

    def guarded(path: str, endpoint: Endpoint) -> Route:
        async def guard(request: Request) -> Response:
            if token is None or _carries(request, token):
                return await endpoint(request)
            text = "show the token: as the password, or with `Authorization: Bearer …`\n"
            return PlainTextResponse(text, 401, {"WWW-Authenticate": 'Basic realm="ECAvg"'})

        return Route(path, guard)

    async def api_status(_: Request) -> Response:
        return Response(
            to_json(await status()), media_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", 503)

    own: dict[str, Endpoint] = {"/api/status": api_status, "/metrics": metrics}
    routes = [guarded(path, endpoint) for path, endpoint in (own | dict(more)).items()]
    return Starlette(routes=[*routes, Route("/healthz", healthz), Route("/readyz", readyz)])


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


class _BoundedProtocol(H11Protocol):
    """The HTTP protocol of uvicorn, with limits so that many or slow connections do not keep others out.

    uvicorn itself waits for ever for the rest of a request, and for a caller that does not read the answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection, and close the oldest connection if there are too many."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._last_request: object = None
        self._num_standstills = 0
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
        """Close the connection if it has begun no other request since the last check, and reads no answer."""
        self._num_standstills = self._num_standstills + 1 if self._stands_still() else 0
        if self.cycle is self._last_request and not self._is_being_answered():
            self.transport.abort()
            return
        self._last_request = self.cycle
        self._next_check = self.loop.call_later(REQUEST_SECONDS, self._check_progress)

    def resume_writing(self) -> None:
        """Note that the caller reads the answer."""
        self._num_standstills = 0
        super().resume_writing()

    def _is_being_answered(self) -> bool:
        """Return True if an answer is under way whose caller has read of it not long ago."""
        is_under_way = self.cycle and self.cycle.response_started and not self.cycle.response_complete
        return bool(is_under_way) and self._num_standstills < STANDSTILL_CHECKS

    def _stands_still(self) -> bool:
        """Return True if bytes of the answer wait for the caller to read."""
        return self.transport.get_write_buffer_size() > 0


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
