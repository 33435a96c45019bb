"""Machines without a shared network stack, for tests: network namespaces of Linux that a bridge connects."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

INTERFACE = "eth0"


class Namespace(NamedTuple):
    """One machine's network."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Return the words before a command that runs it on this machine."""
        return "ip", "netns", "exec", self.name

    def set_patience(self, num_retries: int) -> None:
        """Set how often the machine sends a TCP segment again before it gives up: 15 times by default."""
        setting = "/proc/sys/net/ipv4/tcp_retries2"
        subprocess.run([*self.prefix, "sh", "-c", f"echo {num_retries} > {setting}"], check=True)

    def set_link(self, state: str) -> None:
        """Plug the machine's cable in or out: "up" or "down"."""
        _ip("-n", self.name, "link", "set", INTERFACE, state)


class Network(NamedTuple):
    """Machines that reach each other and this one."""

    # The address of this machine.
    host: str
    machines: list[Namespace]


@contextmanager
def network_of(num_machines: int) -> Iterator[Network]:
    """Yield a network of machines; skip the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are for root alone")
    if not shutil.which("ip"):
        pytest.skip("there is no ip: install the package iproute2")
    tag = f"ecavg{os.getpid() % 100_000}"
    # The range for benchmarks (RFC 2544), which no real network has. Other processes have other parts of it.
    prefix = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"
    made = [Namespace(f"{tag}-{n}", f"{prefix}.{n + 1}") for n in range(1, num_machines + 1)]
    try:
        _ip("link", "add", tag, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr}")
    try:
        _ip("addr", "add", f"{prefix}.1/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for each in made:
            _connect(each, tag)
        yield Network(f"{prefix}.1", made)
    finally:
        for each in made:
            subprocess.run(["ip", "netns", "delete", each.name], check=False, capture_output=True)
        _ip("link", "delete", tag)


def _connect(each: Namespace, bridge: str) -> None:
    # The name of an interface has 15 characters at most.
    outside = f"{bridge[-10:]}-{each.name[-1]}"
    _ip("netns", "add", each.name)
    _ip("link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", each.name)
    _ip("link", "set", outside, "master", bridge, "up")
    _ip("-n", each.name, "addr", "add", f"{each.address}/24", "dev", INTERFACE)
    each.set_link("up")
    _ip("-n", each.name, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
