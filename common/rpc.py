"""gRPC as both sides use it: options, the table of errors and statuses, and how a call is tried again."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, NamedTuple, Protocol

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

from common.errors import (
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
from common.tls import SERVER_NAME, TlsMaterial

AGENT_ID_KEY = "ecavg-agent-id"  # request metadata: who is calling, over plaintext
REASON_KEY = "ecavg-reason"  # trailing metadata: why the server refused

MAX_MESSAGE_BYTES = 1024 * 1024 + 64 * 1024  # a chunk and its framing; nothing larger ever travels

# A peer that vanished without a word is noticed within the sum of the two.
KEEPALIVE_SECONDS = 20.0  # of silence, then the peer is asked for a sign of life
KEEPALIVE_TIMEOUT_SECONDS = 60.0  # for that sign; on a slow link it queues behind megabytes of data

# How much of a stream may be under way unasked for, besides the message that is being read. By itself gRPC
# takes up to 16 MiB for each stream: half a gigabyte, at a server that 32 agents send to at once.
SERVER_WINDOW_BYTES = 256 * 1024  # 5 MB/s for each agent over a link with a round trip of 100 ms
CHANNEL_WINDOW_BYTES = 1024 * 1024

# What a connection may cost that brings nothing; see also cloud_server/door/connections.py.
HANDSHAKE_SECONDS = 10.0  # TLS and the first frames; an agent gives up sooner on dead servers only
MAX_STREAMS = 16  # at once on one connection: more wait their turn at the agent
MAX_METADATA_BYTES = 8 * 1024
MESSAGE_SECONDS = 30.0  # until the message of a call that has one only is there

FIRST_PAUSE_SECONDS = 0.2  # the longest pause after a first failure
MAX_PAUSE_SECONDS = 15.0  # the longest pause after any

MAX_TEXT_CHARACTERS = 500

Options = list[tuple[str, int]]

log = structlog.get_logger()


def channel_options() -> Options:
    """What an agent's channel needs."""
    return [
        *_common_options(CHANNEL_WINDOW_BYTES),
        # The retries below pace the attempts; the channel must not sit out a longer pause of its own.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # In truth how long one attempt may take: a slow link needs its time.
        ("grpc.min_reconnect_backoff_ms", 10_000),
    ]


def server_options(max_connections: int) -> Options:
    """What the server needs to go with it."""
    return [
        *_common_options(SERVER_WINDOW_BYTES),
        # Agents ask as often as we do; more than twice that counts as abuse and ends the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_SECONDS * 500)),
        # Linux would let a second server share the port in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        # Nobody of ours compresses. Not every gRPC holds what comes out against the limit for messages.
        ("grpc.compression_enabled_algorithms_bitset", 1),  # bit 0: as it is
    ]


def _common_options(window_bytes: int) -> Options:
    return [
        ("grpc.http2.bdp_probe", 0),  # it is what makes windows grow
        ("grpc.http2.lookahead_bytes", window_bytes),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        # By default gRPC stops asking on a connection without data, as one with an idle Watch is.
        ("grpc.http2.max_pings_without_data", 0),
        # The answer to a ping has a time-out of its own; without data it is the only one that works.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
    ]


def server_credentials(material: Callable[[], TlsMaterial]) -> grpc.ServerCredentials:
    """Mutual TLS; `material` is asked before every handshake, from a thread of gRPC's."""
    current = material()

    def configuration() -> Any:
        return grpc.ssl_server_certificate_configuration([(current.key, current.certificate)], current.roots)

    def news() -> Any:
        nonlocal current
        try:
            latest = material()
        except Exception:  # what there was is better than no handshake at all
            log.exception("certificates_not_read")
            return None
        if latest == current:
            return None
        current = latest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), news, require_client_authentication=True)


def channel(address: str, material: TlsMaterial | None) -> grpc.aio.Channel:
    """A connection to our server, wherever it is; None: in plaintext."""
    options = channel_options()
    if material is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(material.roots, material.key, material.certificate)
    name = ("grpc.ssl_target_name_override", SERVER_NAME)
    return grpc.aio.secure_channel(address, credentials, options=[*options, name])


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
# Where several share a status, the reason tells; without one it is the first.
_ERROR = {status: error for error, status in reversed(STATUS.items())}
_ERROR_OF_REASON: dict[Reason, type[Refusal]] = {
    Reason.AGENT_BUDGET: BudgetError,
    Reason.ROUND_BUDGET: BudgetError,
    Reason.RUN_FULL: BudgetError,
    Reason.CALL_RATE: BusyError,
    Reason.OPEN_CALLS: BusyError,
}

# What waiting may cure. OffsetError and CorruptError are cured by asking where to go on.
_RETRIED = (UnavailableError, StorageError, BusyError, OffsetError, CorruptError)


def error_from(rpc_error: grpc.aio.AioRpcError) -> Refusal:
    """The error that the server raised, or UnavailableError where no server answered."""
    trailing: Any = rpc_error.trailing_metadata() or ()
    metadata = dict(iter(trailing))
    details = plain(rpc_error.details() or rpc_error.code().name)
    try:
        reason = Reason(str(metadata.get(REASON_KEY)))
    except ValueError:
        if rpc_error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return InvalidError("no ECAvg server of this version answers there", Reason.PROTOCOL_MISMATCH)
        # Proxies and broken connections end calls with almost any status; only our server gives reasons.
        if rpc_error.code() != grpc.StatusCode.UNAVAILABLE:
            details = f"the connection broke off ({details})"
        return UnavailableError(details)
    error = _ERROR_OF_REASON.get(reason) or _ERROR.get(rpc_error.code(), Refusal)
    return error(details, reason)


def is_retried(error: BaseException) -> bool:
    """Whether waiting may cure it; so it may where our server failed inside (INTERNAL)."""
    return isinstance(error, _RETRIED) or type(error) is Refusal


def plain(text: str) -> str:
    """A stranger's text as one short line that can neither forge a log entry nor steer a terminal."""
    return one_line(text[:MAX_TEXT_CHARACTERS])


class Backoff:
    """Random pauses whose bound doubles with each failure ("full jitter"), up to MAX_PAUSE_SECONDS."""

    def __init__(self) -> None:
        self._num_failures = 0

    def reset(self) -> None:
        """Something was achieved: the next failure is a first one."""
        self._num_failures = 0

    def __call__(self, _: object = None) -> float:
        """The next pause in seconds."""
        bound = FIRST_PAUSE_SECONDS * 2.0 ** min(self._num_failures, 32)
        self._num_failures += 1
        return random.uniform(0, min(bound, MAX_PAUSE_SECONDS))


def retrying(
    on_retry: Callable[[BaseException, float], Awaitable[None]],
    backoff: Backoff | None = None,
    stop: StopBaseT = stop_never,
) -> AsyncRetrying:
    """Try again what is_retried(), with pauses between.

    Args:
        on_retry: called before each pause with the error and the pause in seconds.
        backoff: for whoever can tell progress from failure; by default every attempt is a failure.
        stop: when to raise the last error instead; by default never.
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
    def __call__(
        self, service: str, method: str, code: str, seconds: float, refusal: Reason | None
    ) -> None: ...


class Peer(NamedTuple):
    """Who calls, as far as the transport tells."""

    certificate: bytes | None  # PEM, verified with our roots; None: plaintext
    claimed_id: str  # what the metadata say; worth something only on a server that asks for no more
    address: str = ""  # of the connection, as gRPC writes it: "ipv4:192.0.2.1:50000"


class Admit(Protocol):
    """Entered for the time of each call; raises a Refusal for who may not make it.

    It may also turn the CancelledError of a call that it has cut off into a Refusal.
    """

    def __call__(self, method: str, peer: Peer) -> AbstractContextManager[None]: ...


class RefusingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """The one place that turns errors into statuses, asks who is calling, and measures every call."""

    def __init__(self, observe: ObserveCall, admit: Admit) -> None:
        self._observe = observe
        self._admit = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED itself
            return handler
        _, service, method = handler_call_details.method.split("/")
        kinds = (handler.unary_unary, handler.stream_unary, handler.unary_stream, handler.stream_stream)
        call: Any = next(kind for kind in kinds if kind)

        decode = handler.request_deserializer

        # A call counts from its head on, not from its first message, which may never come: so to gRPC
        # every method is one that takes a stream. On the wire that is the same.
        async def requested(messages: AsyncIterator[bytes]) -> Any:
            if handler.request_streaming:
                return _decoded_stream(messages, decode)
            return _decoded(await _only(messages), decode)

        async def reply(messages: Any, context: Any) -> Any:
            async with self._guard(service, method, context):
                return await call(await requested(messages), context)

        async def stream(messages: Any, context: Any) -> AsyncIterator[Any]:
            async with self._guard(service, method, context):
                answer = call(await requested(messages), context)
                if isinstance(answer, AsyncIterator):
                    async for message in answer:
                        yield message
                else:  # gRPC's own health service writes to the context instead
                    await answer

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(
            stream if handler.response_streaming else reply,
            request_deserializer=None,  # in the guard, so that rubbish is refused as anything else is
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _guard(self, service: str, method: str, context: Any) -> AsyncIterator[None]:
        started = time.perf_counter()
        code, reason = grpc.StatusCode.OK, None
        try:
            with self._admit(method, _peer(context)):
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


def _decoded(request: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(request)
    except DecodeError as error:
        raise InvalidError("the request is not the message that this call takes") from error


async def _decoded_stream(
    requests: AsyncIterator[bytes], decode: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request, decode)


async def _abort(context: Any, code: grpc.StatusCode, text: str, reason: Reason) -> None:
    try:
        await context.abort(code, text, ((REASON_KEY, reason.value),))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:  # gRPC has ended the call itself, over a message that is too long
        raise asyncio.CancelledError from None


def _peer(context: Any) -> Peer:
    certificates = context.auth_context().get("x509_pem_cert")
    claimed_id = dict(context.invocation_metadata() or ()).get(AGENT_ID_KEY, "")
    return Peer(
        certificates[0] if certificates else None,
        claimed_id if isinstance(claimed_id, str) else "",
        context.peer(),
    )


async def _only(messages: AsyncIterator[bytes]) -> bytes:
    """The message of a call that has one."""
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            async for message in messages:
                return message
    except TimeoutError as error:
        raise UnavailableError(f"no message arrived in {MESSAGE_SECONDS:g} seconds; call again") from error
    raise InvalidError("the call has no message")
