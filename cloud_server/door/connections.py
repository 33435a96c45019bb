"""Connections that carry no call, and how they make room when there are too many.

gRPC bounds how many connections there are, and then turns everybody away. Somebody who opens many of them
and says nothing, or a byte now and then, would keep the others out. So once half of them are taken,
connections without an open call are ended, the oldest first. An agent has a Watch open, which shows that its
connection is in use.

gRPC does not tell its connections, but the kernel does (proc_pid_fd(5)). A socket that is shut down beneath
gRPC looks to it as if the other end had gone.
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
# A connection has so much time to come to its first call.
GRACE_SECONDS = 1.0

_FOLDER = "/proc/self/fd"
# So many files are left for blobs that are being written, SQLite, the trainer's pipes and the HTTP port.
_OTHER_FILES = 256

log = structlog.get_logger()


def raise_file_limit() -> int:
    """Raise the limit of open files as far as the system lets us; return how many may be connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _OTHER_FILES)


class Connections:
    """The connections to one port of this process.

    Args:
        port: the port that agents connect to.
        most: how many connections there may be.
        addresses_in_use: returns the addresses that have an open call, as gRPC writes them.
        on_ended: called with the number of connections that were just ended.
        clock: seconds that only ever grow.
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
        self._enough = most // 2
        self._addresses_in_use = addresses_in_use
        self._on_ended = on_ended
        self._clock = clock
        # When each socket was first seen; None: it is no connection of ours.
        self._known: dict[str, float | None] = {}

    async def keep_room(self) -> None:
        """End connections without a call whenever there are too many, for as long as this runs."""
        while sys.platform == "linux":
            await asyncio.sleep(POLL_SECONDS)
            try:
                num_ended = self.make_room()
            except Exception:
                # The connections are counted again after a pause.
                log.exception("connections_not_counted")
                continue
            if num_ended:
                self._on_ended(num_ended)
                log.warning("connections_ended", num_ended=num_ended)

    def make_room(self) -> int:
        """End the connections that are too many, as far as they carry no call; return how many that were."""
        descriptors = os.listdir(_FOLDER)  # noqa: PTH208  quick: this is all that is done in quiet times
        if len(descriptors) <= self._enough:
            self._known.clear()
            return 0
        found = self._look_at(descriptors)
        in_use = {_end_of(address) for address in self._addresses_in_use()}
        left, num_ended, now = len(found), 0, self._clock()
        for since, descriptor in found:
            if left <= self._enough or now - since < GRACE_SECONDS:
                break
            if _ended(descriptor, in_use):
                left, num_ended = left - 1, num_ended + 1
        return num_ended

    def _look_at(self, descriptors: Iterable[str]) -> list[tuple[float, int]]:
        """Return the connections among the descriptors: when each was first seen, and its descriptor."""
        found, known, now = [], {}, self._clock()
        for descriptor in descriptors:
            try:
                name = os.readlink(f"{_FOLDER}/{descriptor}")  # noqa: PTH115
            except FileNotFoundError:
                # The file has been closed meanwhile.
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
        try:
            with _borrowed(descriptor) as connection:
                # A socket that listens has no peer, and raises OSError.
                peer = connection.getpeername()
                return isinstance(peer[0], str) and connection.getsockname()[1] == self._port
        except (OSError, IndexError):
            return False


def _ended(descriptor: int, in_use: Set[tuple[str, int]]) -> bool:
    try:
        with _borrowed(descriptor) as connection:
            if _normal(*connection.getpeername()[:2]) in in_use:
                return False
            connection.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:
        # The connection has ended by itself.
        return False


def _borrowed(descriptor: int) -> socket.socket:
    """Return the socket by a descriptor of our own, because gRPC may close its descriptor at any moment."""
    # This family has room for an address of either kind.
    return socket.fromfd(descriptor, socket.AF_INET6, socket.SOCK_STREAM)


def _end_of(address: str) -> tuple[str, int]:
    """Return host and port of "ipv4:192.0.2.1:50000" or "ipv6:%5B2001:db8::1%5D:50000"."""
    host, _, port = unquote(address).partition(":")[2].rpartition(":")
    return _normal(host.strip("[]"), int(port) if port.isdecimal() else 0)


def _normal(host: str, port: int) -> tuple[str, int]:
    """Return the address in one form: IPv4 over IPv6 becomes IPv4, and the interface is left out."""
    return host.partition("%")[0].removeprefix("::ffff:"), port
