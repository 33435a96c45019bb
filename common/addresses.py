"""Addresses: a host and a port as people write them, as sockets take them, and as they are printed."""

import ipaddress
import re
from typing import NamedTuple

DEFAULT_PORT = 50051

# Names with underscores are against the standards, but some networks and Docker have them.
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?", re.ASCII)
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}")
# This matches what stands before the host in "https://host", "dns:///host", "ipv4:192.0.2.1" and "me@host".
_BEFORE_HOST = re.compile(r"((https?|grpcs?|tcp|dns|ipv4|ipv6):/*)?([^/@]*@)?", re.IGNORECASE)


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return "host:port", with brackets around a host that is an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """Return the address in "host:port" or "[IPv6 address]:port"; blanks around it do not count.

    Raises:
        ValueError: the text is something else; the message says so, and has the right form if there is one.
    """
    address = _address_in(text.strip())
    if address is None:
        meant = _meant(text)
        raise ValueError(
            f"should be HOST:PORT{f'; write {meant}' if meant else ' with a port from 1 to 65535'}"
        )
    return address


def parse_host(text: str) -> str:
    """Return a host to listen on, without brackets; blanks around it do not count.

    Raises:
        ValueError: the text is something else than a host; the message has the host if there is one.
    """
    host = _host_in(text.strip())
    if host is None:
        meant = _meant(text)
        raise ValueError(
            f"should be a host alone; write {meant.host}"
            if meant
            else "should be a host alone, such as 0.0.0.0, :: or localhost"
        )
    return host


def http_url(host: str, port: int, path: str = "/") -> str:
    """Return the URL of a path at this host and port."""
    # In a URL the interface of "fe80::1%eth0" is set off by an escaped percent sign: RFC 6874.
    return f"http://{str(Address(host, port)).replace('%', '%25')}{path}"


def _address_in(text: str) -> Address | None:
    """Return the address that the text is; None: the text is none."""
    host_text, _, port_text = text.rpartition(":")
    host = _host_in(host_text)
    # Without brackets nobody can tell where an IPv6 address ends.
    if (
        host is None
        or (":" in host) != host_text.startswith("[")
        or not re.fullmatch(r"[0-9]{1,5}", port_text)
    ):
        return None
    port = int(port_text)
    return Address(host, port) if 1 <= port <= 65535 else None


def _host_in(text: str) -> str | None:
    """Return the host that the text is, a name beyond ASCII in its IDNA form; None: the text is none."""
    is_bracketed = text.startswith("[") and text.endswith("]")
    bare = text[1:-1] if is_bracketed else text
    if is_bracketed or ":" in bare:
        return bare if _is_ip(bare) and ":" in bare else None
    try:
        name = bare.encode("idna").decode("ascii")
    except UnicodeError:
        return None
    if not _NAME.fullmatch(name) or (_FOUR_NUMBERS.fullmatch(name) and not _is_ip(name)):
        return None
    return name


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _meant(text: str) -> Address | None:
    """Return the address that was meant by a text that is none; None: nobody can tell."""
    whole = re.sub(r"\s*:\s*", ":", text.strip())
    bare = re.split(r"[/?#]", _BEFORE_HOST.sub("", whole, count=1), maxsplit=1)[0]
    host, _, port = bare.rpartition(":")
    candidates = (whole, bare, f"[{host}]:{port}", f"{bare}:{DEFAULT_PORT}", f"[{bare}]:{DEFAULT_PORT}")
    return next(filter(None, map(_address_in, candidates)), None)


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
