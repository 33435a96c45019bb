"""Which connections are ended when there are too many: real sockets, the test's clock."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ecavg.cloud_server.door import connections
from ecavg.cloud_server.door.connections import GRACE_SECONDS, Connections


class Port:
    """Listens, and takes what comes."""

    def __init__(self, stack: ExitStack, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server((host, 0), family=family))
        self.number: int = self._listener.getsockname()[1]
        self.now = 0.0
        self.in_use: set[str] = set()

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        client = self._stack.enter_context(socket.create_connection((host, self.number)))
        self._stack.enter_context(self._listener.accept()[0])
        return client

    def room(self, most: int) -> Connections:
        return Connections(self.number, most, lambda: self.in_use, lambda _: None, lambda: self.now)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True


def test_oldest_connections_without_a_call_are_ended(stack: ExitStack) -> None:
    port = Port(stack)
    old = [port.connect() for _ in range(3)]
    port.in_use = {"ipv4:{}:{}".format(*old[0].getsockname())}
    room = port.room(most=8)
    assert room.make_room() == 0  # nobody has had time for a call
    port.now += GRACE_SECONDS
    new = [port.connect() for _ in range(3)]
    assert room.make_room() == 2
    assert [is_open(client) for client in old] == [True, False, False]
    assert all(is_open(client) for client in new)


def test_nothing_is_ended_while_there_is_room(stack: ExitStack) -> None:
    port = Port(stack)
    clients = [port.connect() for _ in range(8)]
    room = port.room(most=16)
    for _ in range(3):
        assert room.make_room() == 0
        port.now += GRACE_SECONDS
    assert all(is_open(client) for client in clients)


def test_connections_of_other_ports_are_left_alone(stack: ExitStack) -> None:
    port, other = Port(stack), Port(stack)
    clients = [other.connect() for _ in range(8)]
    room = port.room(most=2)
    room.make_room()
    port.now += GRACE_SECONDS
    assert room.make_room() == 0
    assert all(is_open(client) for client in clients)


def test_addresses_are_known_however_they_are_written(stack: ExitStack) -> None:
    port = Port(stack, "::1")
    client = port.connect("::1")
    port.in_use = {f"ipv6:%5B::1%5D:{client.getsockname()[1]}"}
    room = port.room(most=0)
    room.make_room()
    port.now += GRACE_SECONDS
    assert room.make_room() == 0
    port.in_use = {f"ipv6:%5B::1%5D:{client.getsockname()[1] - 1}"}
    assert room.make_room() == 1
    assert connections._parse_address("ipv6:%5B::ffff:192.0.2.1%5D:50000") == ("192.0.2.1", 50000)
    assert connections._parse_address("unix:/run/socket") == ("", 0)


def test_process_may_have_as_many_files_as_the_system_lets_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        assert connections.raise_file_limit() < before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
