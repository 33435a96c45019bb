"""gRPC as both sides use it: options, the table of errors and statuses, and how a call is tried again."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_never,
    wait_random_exponential,
)

from common.errors import (
    ConflictError,
    CorruptError,
    InvalidError,
    LateError,
    NotFoundError,
    OffsetError,
    Reason,
    Refusal,
    StorageError,
    UnavailableError,
)

AGENT_ID_KEY = "ecavg-agent-id"  # request metadata: who is calling
REASON_KEY = "ecavg-reason"  # trailing metadata: why the server refused

MAX_MESSAGE_BYTES = 4 * 1024 * 1024 + 64 * 1024  # a chunk and its framing; nothing larger ever travels

# A peer that vanished without a word is noticed within keepalive_time + keepalive_timeout.
_KEEPALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
_MESSAGE_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

CHANNEL_OPTIONS = [
    *_MESSAGE_LIMITS,
    *_KEEPALIVE,
    # The retries below pace the attempts; the channel must not sit out a longer pause of its own.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]

SERVER_OPTIONS = [
    *_MESSAGE_LIMITS,
    *_KEEPALIVE,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Linux would let a second server share the port in silence.
    ("grpc.so_reuseport", 0),
]

STATUS: dict[type[Refusal], grpc.StatusCode] = {
    InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    LateError: grpc.StatusCode.FAILED_PRECONDITION,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    OffsetError: grpc.StatusCode.OUT_OF_RANGE,
    CorruptError: grpc.StatusCode.DATA_LOSS,
    StorageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    Refusal: grpc.StatusCode.INTERNAL,
}
_ERROR = {status: error for error, status in STATUS.items()}

# What waiting may cure. OffsetError and CorruptError are cured by asking where to go on.
RETRIED = (UnavailableError, StorageError, OffsetError, CorruptError)

log = structlog.get_logger()


def error_from(rpc_error: grpc.aio.AioRpcError) -> Refusal:
    """The error that the server raised, or UnavailableError where no server answered."""
    trailing: Any = rpc_error.trailing_metadata() or ()
    metadata = dict(iter(trailing))
    details = rpc_error.details() or rpc_error.code().name
    try:
        reason = Reason(str(metadata.get(REASON_KEY)))
    except ValueError:
        if rpc_error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return InvalidError("no ECAvg server of this version answers there", Reason.PROTOCOL_MISMATCH)
        # Proxies and broken connections end calls with almost any status; only our server gives reasons.
        return UnavailableError(details)
    return _ERROR.get(rpc_error.code(), Refusal)(details, reason)


def retrying(on_retry: Callable[[BaseException, float], None]) -> AsyncRetrying:
    """Try again for ever, after exponentially growing random pauses (full jitter).

    Args:
        on_retry: called before each pause with the error and the pause in seconds.
    """

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        on_retry(error, state.upcoming_sleep)

    return AsyncRetrying(
        retry=retry_if_exception_type(RETRIED),
        wait=wait_random_exponential(multiplier=0.2, max=15),
        stop=stop_never,
        before_sleep=before_sleep,
        reraise=True,
    )


class ObserveCall(Protocol):
    def __call__(self, service: str, method: str, code: str, seconds: float) -> None: ...


class RefusingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """The one place that turns errors into statuses, and measures every call."""

    def __init__(self, observe: ObserveCall) -> None:
        self._observe = observe

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

        async def reply(request: Any, context: Any) -> Any:
            async with self._guard(service, method, context):
                return await call(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._guard(service, method, context):
                async for message in call(request, context):
                    yield message

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            stream if handler.response_streaming else reply,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _guard(self, service: str, method: str, context: Any) -> AsyncIterator[None]:
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except Refusal as refusal:
            code = STATUS[type(refusal)]
            await context.abort(code, str(refusal), ((REASON_KEY, refusal.reason.value),))
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except Exception:
            log.exception("rpc_failed", method=method)
            code = grpc.StatusCode.INTERNAL
            text = "the server failed inside; its log says more"
            await context.abort(code, text, ((REASON_KEY, Reason.INTERNAL.value),))
        finally:
            self._observe(service, method, code.name, time.perf_counter() - started)
