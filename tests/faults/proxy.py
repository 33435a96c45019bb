"""A TCP proxy that treats a connection as badly as its plan says, and counts the bytes."""

import asyncio
import math
import socket
import struct
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, Self

_PIECE_BYTES = 16 * 1024
_SOCKET_BUFFER_BYTES = 64 * 1024  # small: what waits in a buffer of ours is in flight for both ends
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


class Action(Enum):
    """What happens to the connection on which a fault strikes."""

    CUT = "both ends get a reset"
    TRUNCATE = "both ends get an orderly end, and what was still on its way is lost"
    BLACK_HOLE = "it stays open, and nothing passes any more in either direction"
    FLIP = "one bit arrives inverted"


class Fault(NamedTuple):
    """Strikes once, on whichever connection is the one to reach it."""

    action: Action
    after_bytes: int  # that passed in this direction, over all connections, since the fault before


class Flow:
    """One direction of all connections: how it treats what passes, and how much has passed.

    Args:
        faults: strike one after the other.
        bytes_per_second: of each connection.
        delay_seconds: of each 16 KiB.
    """

    def __init__(
        self,
        *faults: Fault,
        bytes_per_second: float = math.inf,
        delay_seconds: float = 0.0,
    ) -> None:
        self.faults: list[Fault] = list(faults)
        self.bytes_per_second = bytes_per_second
        self.delay_seconds = delay_seconds
        self.num_bytes = 0  # taken from the sender, whether or not they arrived
        self._last_fault_at = 0

    def take(self, piece: bytes) -> tuple[bytes, Action | None]:
        """Return the bytes of the piece to pass on, and the action that ends the connection after them.

        The action is None if the connection goes on.
        """
        start, self.num_bytes = self.num_bytes, self.num_bytes + len(piece)
        if not self.faults or self.num_bytes <= self._last_fault_at + self.faults[0].after_bytes:
            return piece, None
        fault = self.faults.pop(0)
        self._last_fault_at += fault.after_bytes
        position = max(self._last_fault_at - start, 0)
        if fault.action is Action.FLIP:
            return piece[:position] + bytes([piece[position] ^ 1]) + piece[position + 1 :], None
        return piece[:position], fault.action

    def pause_seconds(self, num_bytes: int) -> float:
        return self.delay_seconds + num_bytes / self.bytes_per_second


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes on to `server_port`.

    Args:
        up: from agents to the server; may be exchanged at any time.
        down: from the server to agents.
    """

    def __init__(self, server_port: int, *, up: Flow | None = None, down: Flow | None = None) -> None:
        self.up = up or Flow()
        self.down = down or Flow()
        self.is_down = False  # new connections are reset
        self.num_connections = 0
        self._server_port = server_port
        self._listener = _socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._accepting: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._listener.listen()
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._accepting.cancel()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(self._accepting, *self._connections, return_exceptions=True)
        self._listener.close()

    def strike(self, action: Action) -> None:
        """All connections that are open now end like this."""
        for connection in self._connections.values():
            connection.strike(action)

    async def _accept(self) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            client.setblocking(False)
            connection = _Connection(self, client, self._server_port)
            task = asyncio.create_task(connection.run())
            self._connections[task] = connection
            task.add_done_callback(self._connections.pop)
            self.num_connections += 1
            if self.is_down:
                connection.strike(Action.CUT)


class _Connection:
    def __init__(self, proxy: Proxy, client: socket.socket, server_port: int) -> None:
        self._proxy = proxy
        self._client = client
        self._server = _socket()
        self._server_port = server_port
        self._end: asyncio.Future[Action] = asyncio.get_running_loop().create_future()

    def strike(self, action: Action) -> None:
        if not self._end.done():
            self._end.set_result(action)

    async def run(self) -> None:
        passing = asyncio.create_task(self._pass_both_ways())
        try:
            action = await self._end
            passing.cancel()
            await asyncio.wait([passing])
            await _ENDINGS[action]((self._client, self._server))
        finally:
            passing.cancel()
            self._client.close()
            self._server.close()

    async def _pass_both_ways(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(self._server, ("127.0.0.1", self._server_port))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(self._client, self._server, "up"))
                tasks.create_task(self._pass(self._server, self._client, "down"))
        except* OSError:
            self.strike(Action.CUT)

    async def _pass(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        loop = asyncio.get_running_loop()
        while piece := await loop.sock_recv(source, _PIECE_BYTES):
            flow: Flow = getattr(self._proxy, direction)
            await asyncio.sleep(flow.pause_seconds(len(piece)))
            passed, action = flow.take(piece)
            await loop.sock_sendall(sink, passed)
            if action:
                return self.strike(action)
        return self.strike(Action.TRUNCATE)


async def _reset(ends: Sequence[socket.socket]) -> None:
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


async def _close(_: Sequence[socket.socket]) -> None: ...


async def _keep_open(_: Sequence[socket.socket]) -> None:
    await asyncio.Event().wait()


_ENDINGS: dict[Action, Any] = {
    Action.CUT: _reset,
    Action.TRUNCATE: _close,
    Action.BLACK_HOLE: _keep_open,
}


def _socket() -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # handed down to accepted connections
        made.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    return made
