"""The gRPC code of both sides: options, credentials, the table of errors and statuses, and retries."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import grpc
import structlog
from google.protobuf.message import DecodeError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_never,
)
from tenacity.stop import StopBaseT

from ecavg.common import proxy as proxies
from ecavg.common import tracing
from ecavg.common.errors import (
    BudgetError,
    BusyError,
    ConflictError,
    CorruptError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    OffsetError,
    Reason,
    Refusal,
    StorageError,
    UnauthenticatedError,
    UnavailableError,
    one_line,
)
from ecavg.common.proxy import Proxy
from ecavg.common.tls import SERVER_NAME, TlsMaterial

# The key of the request metadata that names the calling agent over plaintext.
AGENT_ID_KEY = "ecavg-agent-id"
# The key of the request metadata with a text that each process of an agent chooses at random.
INSTANCE_KEY = "ecavg-instance"
# The key of the trailing metadata that holds the Reason of a refusal.
REASON_KEY = "ecavg-reason"

# The largest message is a chunk of 1 MiB and its framing.
MAX_MESSAGE_BYTES = 1024 * 1024 + 64 * 1024

# After KEEPALIVE_SECONDS of silence the peer is pinged, and has KEEPALIVE_TIMEOUT_SECONDS to answer. A peer
# that has vanished is therefore noticed within the sum of the two. The time-out is long because on a slow
# link the answer queues behind megabytes of data.
KEEPALIVE_SECONDS = 20.0
KEEPALIVE_TIMEOUT_SECONDS = 60.0

# These windows bound the bytes of a stream that are under way, besides the message that is being read.
# By default gRPC allows up to 16 MiB for each stream, which is half a gigabyte at a server with 32 agents.
# With a window and a chunk of 256 KiB each, an agent reaches 5 MB/s over a round trip of 100 ms.
SERVER_WINDOW_BYTES = 256 * 1024
CHANNEL_WINDOW_BYTES = 1024 * 1024

# The limits below bound the cost of a useless connection; see also cloud_server/door/connections.py.
# HANDSHAKE_SECONDS covers TLS and the first frames of HTTP/2.
HANDSHAKE_SECONDS = 10.0
# One connection may have so many open streams. The agent's gRPC queues the calls beyond that number.
MAX_STREAMS = 16
MAX_METADATA_BYTES = 8 * 1024
# The only message of a call that does not stream must arrive within this time.
MESSAGE_SECONDS = 30.0

# FIRST_PAUSE_SECONDS bounds the pause after a first failure, MAX_PAUSE_SECONDS the pause after any failure.
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 15.0

MAX_TEXT_CHARACTERS = 500

Options = list[tuple[str, int | str]]

log = structlog.get_logger()


def channel_options() -> Options:
    """Return the gRPC options of an agent's channel."""
    return [
        *_common_options(CHANNEL_WINDOW_BYTES),
        # `retrying` below paces the attempts. The channel must not add a longer pause of its own.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # In spite of its name, this option sets how long one attempt may take; a slow link needs the time.
        ("grpc.min_reconnect_backoff_ms", 10_000),
    ]


def server_options(max_connections: int) -> Options:
    """Return the gRPC options of the server, which match those of `channel_options`."""
    return [
        *_common_options(SERVER_WINDOW_BYTES),
        # Agents ping once in KEEPALIVE_SECONDS. More than twice as often counts as abuse, and ends the
        # connection.
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_SECONDS * 500)),
        # Without this option, Linux lets a second server share the port, and nobody notices.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # These calls may wait until the event loop takes them. gRPC cancels some of those above the first
        # number and all above the second, and without these options the numbers are 1000 and 3000. A fleet
        # whose agents all call at once would lose calls.
        ("grpc.server.max_pending_requests", max(1000, max_connections)),
        ("grpc.server.max_pending_requests_hard_limit", max(3000, 3 * max_connections)),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        # Agents do not compress, and not every version of gRPC checks the decompressed message against the
        # size limit. Bit 0 stands for "no compression", the only algorithm that is allowed here.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def _common_options(window_bytes: int) -> Options:
    """Return the options that the channel and the server share."""
    return [
        # The probe for the bandwidth-delay product would make the windows grow.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window_bytes),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        # By default gRPC stops pinging on a connection without data. The connection of an idle Watch has
        # no data.
        ("grpc.http2.max_pings_without_data", 0),
        # The answer to a ping has a time-out of its own, the only one that counts on a connection without
        # data.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
    ]


def server_credentials(material: Callable[[], TlsMaterial]) -> grpc.ServerCredentials:
    """Return credentials for mutual TLS.

    Args:
        material: returns the server's keys and roots; called before every handshake, in a thread of gRPC.
    """
    current = material()

    def configuration() -> Any:
        return grpc.ssl_server_certificate_configuration([(current.key, current.certificate)], current.roots)

    def changed_configuration() -> Any:
        nonlocal current
        try:
            latest = material()
        # A handshake with the previous material is better than no handshake.
        except Exception:
            log.exception("certificates_not_read")
            return None
        if latest == current:
            return None
        current = latest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), changed_configuration, require_client_authentication=True
    )


def channel(address: str, material: TlsMaterial | None) -> grpc.aio.Channel:
    """Return a channel to the server at `address`, which connects with its first call.

    Args:
        address: the server as "HOST:PORT". TLS does not check the host, because a server may move.
        material: the agent's key, its certificate and the root to trust; None stands for plaintext.

    Raises:
        UsageError: as for `ecavg.common.proxy.find`.
    """
    proxy = proxies.find(address)
    options = [*channel_options(), *_route_options(address, proxy)]
    # Without the scheme, gRPC would take a host whose name is "dns" or "unix" for a scheme.
    target = f"dns:///{quote(str(proxy.address) if proxy else address, safe=':[]')}"
    if material is None:
        authority = ("grpc.default_authority", address)
        return grpc.aio.insecure_channel(target, options=[*options, authority])
    credentials = grpc.ssl_channel_credentials(material.roots, material.key, material.certificate)
    name = ("grpc.ssl_target_name_override", SERVER_NAME)
    return grpc.aio.secure_channel(target, credentials, options=[*options, name])


def _route_options(address: str, proxy: Proxy | None) -> Options:
    """Return the options by which gRPC takes the way that common/proxy.py has chosen, and no other."""
    options: Options = [("grpc.enable_http_proxy", 0)]
    if proxy:
        options.append(("grpc.http_connect_server", address))
    if proxy and proxy.headers:
        headers = "\n".join(f"{name}:{value}" for name, value in proxy.headers.items())
        options.append(("grpc.http_connect_headers", headers))
    return options


STATUS: dict[type[Refusal], grpc.StatusCode] = {
    InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    OffsetError: grpc.StatusCode.OUT_OF_RANGE,
    CorruptError: grpc.StatusCode.DATA_LOSS,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    StorageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BudgetError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    Refusal: grpc.StatusCode.INTERNAL,
}
# Where several errors share a status, this table has the first of them, and the reason tells them apart.
_ERROR_OF_STATUS = {status: error for error, status in reversed(STATUS.items())}
_ERROR_OF_REASON: dict[Reason, type[Refusal]] = {
    Reason.AGENT_BUDGET: BudgetError,
    Reason.ROUND_BUDGET: BudgetError,
    Reason.RUN_FULL: BudgetError,
    Reason.CALL_RATE: BusyError,
    Reason.OPEN_CALLS: BusyError,
}

# A later attempt may succeed after these errors. After OffsetError and CorruptError, the attempt first
# queries the offset to continue from.
_RETRIED = (UnavailableError, StorageError, BusyError, OffsetError, CorruptError)


def error_from(rpc_error: grpc.aio.AioRpcError) -> Refusal:
    """Return the error that the server raised, or an UnavailableError if no ECAvg server answered."""
    trailing: Any = rpc_error.trailing_metadata() or ()
    metadata = dict(iter(trailing))
    details = plain(rpc_error.details() or rpc_error.code().name)
    try:
        reason = Reason(str(metadata.get(REASON_KEY)))
    except ValueError:
        if rpc_error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return InvalidError("no ECAvg server of this version answers there", Reason.PROTOCOL_MISMATCH)
        # Proxies and broken connections end calls with almost any status, but only our server gives a reason.
        if rpc_error.code() != grpc.StatusCode.UNAVAILABLE:
            details = f"the connection broke off ({details})"
        return UnavailableError(details)
    error = _ERROR_OF_REASON.get(reason) or _ERROR_OF_STATUS.get(rpc_error.code(), Refusal)
    return error(details, reason)


def is_retried(error: BaseException) -> bool:
    """Return True if a later attempt may succeed.

    A fault inside the server (INTERNAL, a plain Refusal) is retried, too.
    """
    return isinstance(error, _RETRIED) or type(error) is Refusal


def plain(text: str) -> str:
    """Return a stranger's text as one line of at most MAX_TEXT_CHARACTERS that is safe to print and log."""
    return one_line(text[:MAX_TEXT_CHARACTERS])


class Backoff:
    """A sequence of random pauses whose bound doubles with each failure, up to MAX_PAUSE_SECONDS.

    The method is "full jitter": each pause is drawn uniformly between zero and the bound.
    """

    def __init__(self) -> None:
        self._num_failures = 0

    def reset(self) -> None:
        """Start again with the shortest bound, after some progress."""
        self._num_failures = 0

    def __call__(self, _: object = None) -> float:
        """Return the next pause in seconds."""
        bound = FIRST_PAUSE_SECONDS * 2.0 ** min(self._num_failures, 32)
        self._num_failures += 1
        return random.uniform(0, min(bound, MAX_PAUSE_SECONDS))


def retrying(
    on_retry: Callable[[BaseException, float], Awaitable[None]],
    backoff: Backoff | None = None,
    stop: StopBaseT = stop_never,
) -> AsyncRetrying:
    """Return a retry loop that repeats an attempt after each error for which `is_retried` is true.

    Args:
        on_retry: called before each pause with the error and the pause in seconds.
        backoff: the pauses, for a caller that resets them after progress; by default the bound keeps growing.
        stop: the condition to give up and raise the last error; by default the loop never gives up.
    """

    async def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        await on_retry(error, state.upcoming_sleep)

    return AsyncRetrying(
        retry=retry_if_exception(is_retried),
        wait=backoff or Backoff(),
        stop=stop,
        before_sleep=before_sleep,
        reraise=True,
    )


class ObserveCall(Protocol):
    """The type of a function that measures a call; called once, at the end of each call."""

    def __call__(self, service: str, method: str, code: str, seconds: float, refusal: Reason | None) -> None:
        """Count and measure one call that has ended.

        Args:
            service: the name of the gRPC service.
            method: the name of the method, without the service.
            code: the name of the status, for example "OK".
            seconds: the duration of the call.
            refusal: the reason if the call was refused.
        """


class Peer(NamedTuple):
    """The identity of a caller, as far as the transport shows it."""

    certificate: bytes | None
    """The caller's certificate, PEM, verified with the server's roots; None over plaintext."""
    claimed_id: str
    """The agent id in the metadata, which counts only on a server without TLS."""
    address: str = ""
    """The address of the connection, as gRPC writes it: "ipv4:192.0.2.1:50000"."""
    instance_id: str = ""
    """The random text that the calling process has chosen; "" if the process shows none."""
    traceparent: str = ""
    """The span of the caller, in W3C's format; "" if the caller shows none."""


class Admit(Protocol):
    """The type of a context manager that is open for the time of each call.

    The context manager raises a Refusal if the caller may not make the call. It may also cancel the call,
    and turn the CancelledError into a Refusal.
    """

    def __call__(self, method: str, peer: Peer) -> AbstractContextManager[None]:
        """Return the context manager for one call of `method` by `peer`."""


class RefusingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """The one place that turns errors into statuses, checks the caller, and measures every call."""

    def __init__(self, observe: ObserveCall, admit: Admit) -> None:
        self._observe = observe
        self._admit = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return a handler that runs the method's own handler inside the guard."""
        handler = await continuation(handler_call_details)
        # Without a handler there is no such method, and gRPC itself answers UNIMPLEMENTED.
        if handler is None:
            return handler
        _, service, method = handler_call_details.method.split("/")
        kinds = (handler.unary_unary, handler.stream_unary, handler.unary_stream, handler.stream_stream)
        call: Any = next(kind for kind in kinds if kind)

        decode = handler.request_deserializer

        # A call must count from its start on, not from its first message, which may never arrive. Therefore
        # every method is declared to gRPC as one that takes a stream; on the wire there is no difference.
        async def read_request(messages: AsyncIterator[bytes]) -> Any:
            if handler.request_streaming:
                return _decode_stream(messages, decode)
            return _decode(await _read_single_message(messages), decode)

        async def reply(messages: Any, context: Any) -> Any:
            async with self._guard(service, method, context):
                return await call(await read_request(messages), context)

        # The answers are written here, not handed to gRPC as a generator: a call that is cut off while gRPC
        # writes would leave the guard unasked, and its client without a status.
        async def stream(messages: Any, context: Any) -> None:
            async with self._guard(service, method, context):
                answer = call(await read_request(messages), context)
                if isinstance(answer, AsyncIterator):
                    async for message in answer:
                        await context.write(message)
                # gRPC's own health service is a coroutine that writes its messages to the context.
                else:
                    await answer

        make_handler = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make_handler(
            stream if handler.response_streaming else reply,
            # The request is decoded inside the guard, which refuses an undecodable request like any other.
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _guard(self, service: str, method: str, context: Any) -> AsyncIterator[None]:
        """Admit the caller, abort the call with the status of an error, and measure the call."""
        started = time.perf_counter()
        code, reason = grpc.StatusCode.OK, None
        try:
            peer = _peer_of(context)
            with self._admit(method, peer), tracing.remote_span(method, peer.traceparent):
                yield
        except Refusal as refusal:
            code, reason = STATUS[type(refusal)], refusal.reason
            await _abort(context, code, str(refusal), reason)
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except Exception:
            log.exception("rpc_failed", method=method)
            code, reason = grpc.StatusCode.INTERNAL, Reason.INTERNAL
            text = "the server failed inside; its log says more"
            await _abort(context, code, text, reason)
        finally:
            self._observe(service, method, code.name, time.perf_counter() - started, reason)


def _decode(request: bytes, decode: Callable[[bytes], Any]) -> Any:
    """Return the decoded request, or raise InvalidError."""
    try:
        return decode(request)
    except DecodeError as error:
        raise InvalidError("the request is not the message that this call takes") from error


async def _decode_stream(
    requests: AsyncIterator[bytes], decode: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decode(request, decode)


async def _abort(context: Any, code: grpc.StatusCode, text: str, reason: Reason) -> None:
    """Abort the call with the status, the text and the reason; always raises."""
    try:
        await context.abort(code, text, ((REASON_KEY, reason.value),))
    except grpc.aio.AbortError:
        raise
    # gRPC itself has already ended the call, because a message was too long.
    except grpc.aio.BaseError:
        raise asyncio.CancelledError from None


def _peer_of(context: Any) -> Peer:
    certificates = context.auth_context().get("x509_pem_cert")
    metadata = dict(context.invocation_metadata() or ())
    claimed_id, instance_id, traceparent = (
        value if isinstance(value := metadata.get(key, ""), str) else ""
        for key in (AGENT_ID_KEY, INSTANCE_KEY, tracing.TRACEPARENT)
    )
    certificate = certificates[0] if certificates else None
    return Peer(certificate, claimed_id, context.peer(), instance_id, traceparent)


async def _read_single_message(messages: AsyncIterator[bytes]) -> bytes:
    """Return the only message of a call that does not stream.

    Raises:
        UnavailableError: no message arrived within MESSAGE_SECONDS.
        InvalidError: the call ended without a message.
    """
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            async for message in messages:
                return message
    except TimeoutError as error:
        raise UnavailableError(f"no message arrived in {MESSAGE_SECONDS:g} seconds; call again") from error
    raise InvalidError("the call has no message")
