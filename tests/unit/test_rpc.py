"""How calls are tried again, and that both sides agree on keepalive."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from tenacity import stop_after_attempt

from ecavg.common import rpc
from ecavg.common.errors import (
    BudgetError,
    BusyError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Reason,
    Refusal,
    UnavailableError,
)
from ecavg.common.rpc import Backoff, Peer, RefusingInterceptor


def test_bound_of_pauses_doubles_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff()
    assert [backoff() for _ in range(9)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15])


def test_pauses_are_bounded_however_long_the_server_is_away() -> None:
    backoff = Backoff()
    assert all(0 <= backoff() <= rpc.MAX_PAUSE_SECONDS for _ in range(5000))


def test_pauses_have_full_jitter() -> None:
    """Uniform from 0 on: the mean is half of the bound, and all of the range is used."""
    random.seed(1)
    pauses = []
    for _ in range(2000):
        backoff = Backoff()
        pauses.append([backoff() for _ in range(8)][-1])
    assert sum(pauses) / len(pauses) == pytest.approx(rpc.MAX_PAUSE_SECONDS / 2, rel=0.05)
    assert min(pauses) < 0.02 * rpc.MAX_PAUSE_SECONDS
    assert max(pauses) > 0.98 * rpc.MAX_PAUSE_SECONDS


def test_pauses_start_over_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff()
    before = [backoff() for _ in range(5)]
    backoff.reset()
    assert [backoff() for _ in range(5)] == before


async def ignore(*_: object) -> None: ...


async def test_retrying_goes_on_until_an_answer_and_tells_each_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)
    told = []
    num_attempts = 0

    async def tell(error: BaseException, seconds: float) -> None:
        told.append((str(error), seconds))

    async for attempt in rpc.retrying(tell):
        with attempt:
            num_attempts += 1
            if num_attempts < 40:
                raise UnavailableError("away")
    assert told == [("away", 0.0)] * 39


async def test_errors_that_waiting_does_not_cure_are_not_retried() -> None:
    async def refuse() -> None:
        raise InvalidError("no")

    with pytest.raises(InvalidError):
        await rpc.retrying(ignore)(refuse)


def test_fault_inside_the_server_is_retried_and_its_no_is_not() -> None:
    assert rpc.is_retried(Refusal("the server failed inside", Reason.INTERNAL))
    assert not rpc.is_retried(NotFoundError("no such blob"))
    assert rpc.is_retried(BusyError("too many calls"))
    assert not rpc.is_retried(BudgetError("too many bytes"))
    assert not rpc.is_retried(InvalidError("again and again", Reason.INTERNAL))


async def test_retrying_that_is_stopped_raises_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.0)

    async def fail() -> None:
        raise UnavailableError("away")

    with pytest.raises(UnavailableError, match="away"):
        await rpc.retrying(ignore, stop=stop_after_attempt(3))(fail)


def test_server_allows_the_pings_that_agents_send() -> None:
    channel, server = dict(rpc.channel_options()), dict(rpc.server_options(512))
    least = server["grpc.http2.min_ping_interval_without_data_ms"]
    for options in (channel, server):
        assert options["grpc.keepalive_time_ms"] >= 2 * least
        assert options["grpc.http2.max_pings_without_data"] == 0  # or a silent Watch is not watched over


async def read_all(stream: Any) -> None:
    while await stream.read() != grpc.aio.EOF:
        pass


async def test_call_that_is_cut_off_while_it_writes_ends_with_the_reason() -> None:
    """A client that reads slowly keeps the server in the middle of writing."""
    num_yielded, calls = 0, []

    @contextmanager
    def admit(_: str, __: Peer) -> Iterator[None]:
        calls.append(asyncio.current_task())
        try:
            yield
        except asyncio.CancelledError:
            calls[0].uncancel()
            raise ForbiddenError("cut off") from None

    async def answer(_: bytes, __: object) -> AsyncIterator[bytes]:
        nonlocal num_yielded
        while True:
            num_yielded += 1
            yield bytes(1024 * 1024)

    interceptor = RefusingInterceptor(lambda *_: None, admit)
    server = grpc.aio.server(interceptors=[interceptor])
    handlers = {"Endless": grpc.unary_stream_rpc_method_handler(answer, request_deserializer=bytes)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = channel.unary_stream("/Test/Endless", bytes, bytes)(b"")
            await stream.read()
            before = -1
            while before != num_yielded:
                before = num_yielded
                await asyncio.sleep(0.2)
            calls[0].cancel()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asyncio.wait_for(read_all(stream), 30)
        assert (refused.value.code(), refused.value.details()) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "cut off",
        )
    finally:
        await server.stop(0)


async def test_calls_of_a_crowd_wait_until_the_event_loop_takes_them() -> None:
    num_channels, num_calls = 100, 1500
    server = grpc.aio.server(options=rpc.server_options(num_calls))
    port = server.add_insecure_port("127.0.0.1:0")
    answer = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", {"Echo": answer}),))
    await server.start()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options))
            for _ in range(num_channels)
        ]
        calls = [
            channels[number % num_channels].unary_unary("/Echo/Echo", None, None)
            for number in range(num_calls)
        ]
        begun = [call.future(b"x", timeout=60) for call in calls]
        # The event loop does nothing meanwhile, as where thousands of messages are before these.
        time.sleep(2)  # noqa: ASYNC251
        codes = await asyncio.to_thread(lambda: Counter(call.code() for call in begun))
    await server.stop(None)
    assert codes == {grpc.StatusCode.OK: num_calls}


async def echo(request: bytes, _: object) -> bytes:
    return request
