"""Connections that carry no call, and what becomes of them when there are too many.

gRPC bounds how many connections there are, and then turns everybody away: whoever opens many and says
nothing, or a byte now and then, would keep the others out. So once half of them are taken, those without an
open call are ended, the oldest first. An agent has a Watch open; by that its connection is known to be used.

gRPC does not tell its connections, but the kernel does (proc_pid_fd(5)). A socket that is shut down under it
looks to gRPC as if the other end had gone.
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
GRACE_SECONDS = 1.0  # in which a connection may come to its first call

_FOLDER = "/proc/self/fd"
_OTHER_FILES = 256  # blobs that are being written, SQLite, the trainer's pipes, the HTTP port's connections

log = structlog.get_logger()


def raise_file_limit() -> int:
    """Have as many files as the system lets us; returns how many of them may be connections of agents."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _OTHER_FILES)


class Connections:
    """The connections to one port of this process.

    Args:
        port: of the agents.
        most: as many as there may be.
        addresses_in_use: of the other ends that have an open call, as gRPC writes them.
        on_ended: told how many have just been ended.
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
        self._known: dict[str, float | None] = {}  # by socket: first seen when; None: it is none of ours

    async def keep_room(self) -> None:
        """End connections without a call whenever there are too many, for as long as this runs."""
        while sys.platform == "linux":
            await asyncio.sleep(POLL_SECONDS)
            try:
                num_ended = self.make_room()
            except Exception:  # look again
                log.exception("connections_not_counted")
                continue
            if num_ended:
                self._on_ended(num_ended)
                log.warning("connections_ended", num_ended=num_ended)

    def make_room(self) -> int:
        """End those that are too many, as far as they carry no call; how many that were."""
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
        """The connections among them: since when, and their descriptors; the oldest first."""
        found, known, now = [], {}, self._clock()
        for descriptor in descriptors:
            try:
                name = os.readlink(f"{_FOLDER}/{descriptor}")  # noqa: PTH115
            except FileNotFoundError:  # closed meanwhile
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
                peer = connection.getpeername()  # what listens has none
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
    except OSError:  # it has ended by itself
        return False


def _borrowed(descriptor: int) -> socket.socket:
    """By a descriptor of our own: gRPC's may be closed, and become another file's, at any moment."""
    return socket.fromfd(descriptor, socket.AF_INET6, socket.SOCK_STREAM)  # has room for an address of either


def _end_of(address: str) -> tuple[str, int]:
    """Host and port of "ipv4:192.0.2.1:50000" or "ipv6:%5B2001:db8::1%5D:50000"."""
    host, _, port = unquote(address).partition(":")[2].rpartition(":")
    return _normal(host.strip("[]"), int(port) if port.isdecimal() else 0)


def _normal(host: str, port: int) -> tuple[str, int]:
    """IPv4 that came in by way of IPv6 is IPv4; the interface does not count."""
    return host.partition("%")[0].removeprefix("::ffff:"), port
