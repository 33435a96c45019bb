"""The end of connections that carry no call, when there are too many connections.

gRPC limits the number of connections, and refuses every new connection once the limit is reached. A stranger
who opens many connections, and sends nothing or a byte now and then, would keep the agents out. Therefore,
once half of the limit is reached, connections without an open call are ended, the oldest first. The
connection of an agent carries an open Watch, and is not ended.

gRPC does not list its connections, but the kernel does (proc_pid_fd(5)). When this module shuts down a socket
of gRPC, gRPC takes it that the peer has disconnected.
"""

import asyncio
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Set
from urllib.parse import unquote

import structlog

POLL_SECONDS = 0.25
# A connection has this time to begin its first call.
GRACE_SECONDS = 1.0

_FOLDER = "/proc/self/fd"
# So many open files are reserved for blobs, SQLite, the trainer's pipes and the HTTP server's connections.
_OTHER_FILES = 256

log = structlog.get_logger()


def raise_file_limit() -> int:
    """Raise the limit of open files as far as the system allows; return how many may be connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _OTHER_FILES)


class Connections:
    """The connections to one port of this process.

    Args:
        port: the port that agents connect to.
        most: the largest number of connections.
        addresses_in_use: returns the peers' addresses of the connections with an open call, as gRPC writes
            them.
        on_ended: called with the number of connections that have just been ended.
        clock: returns seconds that never decrease.
    """

    def __init__(
        self,
        port: int,
        most: int,
        addresses_in_use: Callable[[], Iterable[str]],
        on_ended: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port = port
        self._max_kept = most // 2
        self._addresses_in_use = addresses_in_use
        self._on_ended = on_ended
        self._clock = clock
        # The time at which each socket was first seen; None for a socket that is no connection to the port.
        self._known: dict[str, float | None] = {}

    async def keep_room(self) -> None:
        """Call `make_room` again and again until this task is cancelled; do nothing but on Linux."""
        while sys.platform == "linux":
            await asyncio.sleep(POLL_SECONDS)
            try:
                num_ended = self.make_room()
            except Exception:
                # The task must survive, and tries again after a pause.
                log.exception("connections_not_counted")
                continue
            if num_ended:
                self._on_ended(num_ended)
                log.warning("connections_ended", num_ended=num_ended)

    def make_room(self) -> int:
        """End connections without a call, the oldest first, until few enough are left.

        Returns:
            The number of ended connections.
        """
        # This count is all the work while there are few connections, and `os.listdir` is the quickest way.
        descriptors = os.listdir(_FOLDER)  # noqa: PTH208
        if len(descriptors) <= self._max_kept:
            self._known.clear()
            return 0
        found = self._find_connections(descriptors)
        in_use = {_parse_address(address) for address in self._addresses_in_use()}
        left, num_ended, now = len(found), 0, self._clock()
        for since, descriptor in found:
            if left <= self._max_kept or now - since < GRACE_SECONDS:
                break
            if _end_if_unused(descriptor, in_use):
                left, num_ended = left - 1, num_ended + 1
        return num_ended

    def _find_connections(self, descriptors: Iterable[str]) -> list[tuple[float, int]]:
        """Return the connections among the descriptors, the oldest first.

        Returns:
            For each connection the time at which it was first seen, and its descriptor.
        """
        found, known, now = [], {}, self._clock()
        for descriptor in descriptors:
            try:
                name = os.readlink(f"{_FOLDER}/{descriptor}")  # noqa: PTH115
            except FileNotFoundError:
                # The descriptor has been closed since the folder was listed.
                continue
            if not name.startswith("socket:"):
                continue
            if name in self._known:
                since = self._known[name]
            else:
                since = now if self._is_ours(int(descriptor)) else None
            known[name] = since
            if since is not None:
                found.append((since, int(descriptor)))
        self._known = known
        return sorted(found)

    def _is_ours(self, descriptor: int) -> bool:
        """Return True if the descriptor is a connection to the port."""
        try:
            with _duplicate_socket(descriptor) as connection:
                # A socket that listens has no peer, and raises OSError.
                peer = connection.getpeername()
                return isinstance(peer[0], str) and connection.getsockname()[1] == self._port
        except (OSError, IndexError):
            return False


def _end_if_unused(descriptor: int, in_use: Set[tuple[str, int]]) -> bool:
    """Shut the connection down unless its peer has an open call; return True if it was shut down."""
    try:
        with _duplicate_socket(descriptor) as connection:
            if _in_one_form(*connection.getpeername()[:2]) in in_use:
                return False
            connection.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:
        # The connection has ended by itself.
        return False


def _duplicate_socket(descriptor: int) -> socket.socket:
    """Return the socket under a descriptor of its own.

    gRPC may close its own descriptor at any moment, and another file may then get the same number.
    """
    # The family AF_INET6 has room for the addresses of both families.
    return socket.fromfd(descriptor, socket.AF_INET6, socket.SOCK_STREAM)


def _parse_address(address: str) -> tuple[str, int]:
    """Return host and port of "ipv4:192.0.2.1:50000" or "ipv6:%5B2001:db8::1%5D:50000"."""
    host, _, port = unquote(address).partition(":")[2].rpartition(":")
    return _in_one_form(host.strip("[]"), int(port) if port.isdecimal() else 0)


def _in_one_form(host: str, port: int) -> tuple[str, int]:
    """Return the host without its interface, and as IPv4 if it is IPv4 mapped to IPv6; and the port."""
    return host.partition("%")[0].removeprefix("::ffff:"), port
