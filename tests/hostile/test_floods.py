"""More of everything than anyone needs: connections, streams, calls, bytes. Others are served meanwhile."""

import itertools
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ecavg.common import rpc
from ecavg.common.endpoints import HTTP_CONNECTIONS
from ecavg.common.errors import Reason
from ecavg.common.pb import ecavg_pb2 as pb
from tests.hostile import raw
from tests.hostile.target import (
    CALL_SECONDS,
    SETTLING_SECONDS,
    Agent,
    Target,
    chunk,
    digest_of,
    header,
    honestly,
    refusal_of,
    shard,
    target_in,
    until,
)

MANY = 10_000
SERVED_SECONDS = 8.0  # in which an agent that is new must have come in, whatever goes on


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Start a server for few agents, which therefore allows few connections."""
    folder = tmp_path_factory.mktemp("server")
    with target_in(folder, "--min-agents", 50, "--max-upload-bytes", 1_000_000) as target:
        yield target


newcomers = (f"newcomer-{number}" for number in itertools.count())


def serve_newcomer(target: Target) -> None:
    """Somebody who was not connected before is served, soon."""
    started = time.monotonic()
    name = next(newcomers)
    agent = Agent(target.address, name, target.cluster.enroll(name).material)
    try:
        honestly(agent.stub.Join)(
            pb.JoinRequest(protocol_version=1), wait_for_ready=True, timeout=SERVED_SECONDS
        )
        assert honestly(agent.event)().round == 1
    finally:
        agent.close()
    assert time.monotonic() - started < SERVED_SECONDS


def is_served(agent: Agent) -> bool:
    """Return False while the agent is told that it has too many calls, which end one after the other."""
    try:
        return bool(agent.event().round == 1)
    except grpc.RpcError as error:
        if rpc.error_from(error).reason in (Reason.OPEN_CALLS, Reason.CALL_RATE):
            return False
        raise


def counted(target: Target, sample: str) -> float:
    """Return the value of a sample of the server's metrics."""
    address = f"http://127.0.0.1:{target.cluster.http_port}/metrics"
    with urllib.request.urlopen(address, timeout=30) as reply:
        lines = reply.read().decode("utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(f"{sample} ")).rpartition(" ")[2])


# Connections


def test_connections_that_say_nothing_make_room_for_others(target: Target) -> None:
    before = counted(target, "ecavg_server_connections_ended_total")
    with raw.connections(target.cluster.port, MANY) as connections:
        serve_newcomer(target)
        target.serve_another()
        for connection in connections[::2]:
            raw.send(connection, [b"\x16\x03\x01\x02\x00\x01"])  # half a hello
        serve_newcomer(target)
        target.serve_another()
    assert counted(target, "ecavg_server_connections_ended_total") > before


@pytest.mark.soak
def test_connections_that_send_a_byte_now_and_then_are_ended(target: Target) -> None:
    hello = b"\x16\x03\x01\x02\x00" + bytes(512)
    context = raw.tls_context(target.cluster.folder / target.agent("attacker").agent_id)
    with raw.connections(target.cluster.port, 40) as connections:
        connections[:20] = [context.wrap_socket(connection) for connection in connections[:20]]
        deadline = time.monotonic() + SETTLING_SECONDS
        texts = [raw.PREFACE[:-1]] * 20 + [hello] * 20  # neither is ever whole
        for step in itertools.count():
            alive = [at for at, connection in enumerate(connections) if not raw.is_closed(connection)]
            if not alive:
                break
            assert time.monotonic() < deadline
            for at in alive:
                raw.send(connections[at], [texts[at][step : step + 1]])
            target.serve_another()
            time.sleep(0.5)


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        raw.PREFACE,
        b"\x80\x04\x95" + bytes(1000),
        b"\x16\x03\x01\xff\xff" + b"\xff" * 70_000,
        b"\0" * 100_000,
    ],
)
def test_what_is_no_tls_is_turned_away(target: Target, text: bytes) -> None:
    with raw.connections(target.cluster.port, 1) as (connection,):
        raw.send(connection, [text])
        until(lambda: raw.is_closed(connection))


# Streams


def tls_connections(target: Target, number: int) -> Any:
    context = raw.tls_context(target.cluster.folder / target.agent("attacker").agent_id)
    for _ in range(number):
        connection = context.wrap_socket(socket.create_connection(("127.0.0.1", target.cluster.port), 5))
        connection.sendall(raw.PREFACE)
        yield connection


@pytest.mark.parametrize("method", ["Watch", "Upload", "Join"])
def test_half_open_streams_cost_their_agent_only(target: Target, method: str) -> None:
    open_calls = 'ecavg_server_refusals_total{reason="open_calls"}'
    before, each = counted(target, open_calls), 80
    connections = []
    try:
        for connection in tls_connections(target, MANY // each):
            connections.append(connection)
            heads = [raw.open_call(method, 1 + 2 * number) for number in range(each)]
            raw.send(connection, [b"".join(heads)])
        target.serve_another()
        serve_newcomer(target)
        assert counted(target, open_calls) > before
    finally:
        for connection in connections:
            connection.close()
    until(lambda: is_served(target.agent("attacker")))


def test_streams_that_are_reset_at_once_cost_nothing(target: Target) -> None:
    def heads() -> Iterator[bytes]:
        for first in range(1, 2 * MANY, 200):
            yield b"".join(
                raw.open_call("Watch", stream) + raw.frame(raw.RST_STREAM, 0, stream, raw.CANCEL)
                for stream in range(first, first + 200, 2)
            )

    (connection,) = tls_connections(target, 1)
    with connection:
        raw.send(connection, heads())
        target.serve_another()


def test_header_without_end_takes_little_memory(server: Target) -> None:
    """A hundred megabytes of it. gRPC reads them faster than it forgets them, by some ten megabytes."""

    def frames() -> Iterator[bytes]:
        yield raw.frame(raw.HEADERS, 0, 1, raw.call_head("Watch"))
        for number in range(MANY):
            yield raw.frame(raw.CONTINUATION, 0, 1, 100 * raw.field(f"x-{number}", "y" * 100))

    with server.unharmed(growth_bytes=192 << 20):
        (connection,) = tls_connections(server, 1)
        with connection:
            raw.send(connection, frames())
            server.serve_another()


def test_long_metadata_are_refused(target: Target, attacker: Agent) -> None:
    metadata = tuple((f"x-{number}", "y" * 1000) for number in range(2 * rpc.MAX_METADATA_BYTES // 1000 + 1))
    with pytest.raises(grpc.RpcError) as refused:
        attacker.stub.Join(pb.JoinRequest(protocol_version=1), metadata=metadata, timeout=CALL_SECONDS)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# Messages


@pytest.mark.parametrize("method", ["Upload", "Renew"])
@pytest.mark.parametrize("num_bytes", [100, 128 << 20])
def test_compressed_messages_are_refused(
    target: Target, attacker: Agent, method: str, num_bytes: int
) -> None:
    """Check a compressed message: 128 MiB of zeros become 128 KiB, which would be short enough."""
    zeros = bytes(num_bytes)
    requests = {
        "Upload": iter([header(zeros, "data"), pb.UploadRequest(chunk=zeros)]),
        "Renew": pb.RenewRequest(request=zeros),
    }
    call = getattr(attacker.stub, method)
    with pytest.raises(grpc.RpcError) as refused:
        call(requests[method], compression=grpc.Compression.Gzip, timeout=CALL_SECONDS)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_message_over_the_limit_is_refused(target: Target, attacker: Agent) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        attacker.stub.Renew(pb.RenewRequest(request=bytes(rpc.MAX_MESSAGE_BYTES)), timeout=CALL_SECONDS)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stream_of_empty_chunks_is_refused_at_the_first(target: Target, attacker: Agent) -> None:
    messages = itertools.chain([header(shard(4), "data")], itertools.repeat(chunk(b"")))
    refused = refusal_of(lambda: attacker.stub.Upload(messages, timeout=CALL_SECONDS))
    assert refused.reason is Reason.MALFORMED_REQUEST


def test_header_that_comes_in_single_bytes_costs_no_more_than_one_that_does_not(
    target: Target, attacker: Agent
) -> None:
    content = (1 << 16).to_bytes(8, "little") + b" " * (1 << 16)
    messages = [header(content, "data"), *(chunk(content[at : at + 1]) for at in range(20_000))]
    before = target.cpu_seconds()
    refused = refusal_of(lambda: attacker.stub.Upload(iter(messages), timeout=60))
    assert refused.reason in (Reason.SIZE_MISMATCH, Reason.AGENT_BUDGET)
    assert target.cpu_seconds() - before < 15


def test_bytes_sent_again_and_again_use_up_the_agents_budget(target: Target) -> None:
    """Each time with a wrong digest, so that nothing stays: the server would write for ever."""
    agent = target.agent("sisyphus")
    content = shard(10_000)
    pieces = [content[at : at + (1 << 18)] for at in range(0, len(content), 1 << 18)]
    for number in range(100):
        head = header(content, "data", digest=digest_of(str(number).encode()))
        refused = refusal_of(lambda head=head: agent.send(head, *map(chunk, pieces)))
        if refused.reason is not Reason.DIGEST_MISMATCH:
            break
    assert refused.reason is Reason.AGENT_BUDGET
    assert "max_agent_bytes" in str(refused)
    assert agent.event().outcome == pb.OUTCOME_REJECTED


# Calls


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Target]:
    """Start a server that allows one agent so few calls that even a slow machine makes too many."""
    with target_in(tmp_path, "--max-calls-per-second", 10) as target, target.unharmed():
        yield target


def test_calls_without_pause_are_refused_and_others_are_answered(strict: Target) -> None:
    target, attacker = strict, strict.agent("attacker")
    reasons = set()
    is_over = threading.Event()

    def call_without_pause() -> None:
        while not is_over.is_set():
            try:
                attacker.query("0" * 64, "data")
            except grpc.RpcError as error:
                reasons.add(dict(error.trailing_metadata() or ()).get(rpc.REASON_KEY))

    threads = [threading.Thread(target=call_without_pause) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: Reason.CALL_RATE in reasons)
        for _ in range(3):
            target.serve_another()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert reasons <= {Reason.CALL_RATE, Reason.OPEN_CALLS}
    until(lambda: is_served(attacker))  # calls are earned again


# The HTTP port


def health(target: Target) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{target.cluster.http_port}/healthz", timeout=30) as reply:
        return bytes(reply.read())


@pytest.mark.soak
def test_slow_requests_keep_nobody_from_the_status_page(target: Target) -> None:
    with raw.connections(target.cluster.http_port, 5 * HTTP_CONNECTIONS) as connections:
        for connection in connections:
            raw.send(connection, [b"GET /api/status HTTP/1.1\r\nHost: "])
        assert health(target) == b"ok\n"
        until(lambda: sum(not raw.is_closed(each) for each in connections) <= HTTP_CONNECTIONS)
        deadline = time.monotonic() + SETTLING_SECONDS
        while not all(raw.is_closed(connection) for connection in connections):
            assert time.monotonic() < deadline
            for connection in connections:
                raw.send(connection, [b"x"])
            assert health(target) == b"ok\n"
            time.sleep(0.5)


def test_endless_request_head_is_refused(target: Target) -> None:
    with raw.connections(target.cluster.http_port, 1) as (connection,):
        lines = (b"x-%d: %s\r\n" % (number, b"y" * 1000) for number in range(MANY))
        num_sent = raw.send(connection, itertools.chain([b"GET / HTTP/1.1\r\n"], lines))
        assert num_sent < MANY
        assert health(target) == b"ok\n"
