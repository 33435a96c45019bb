"""The proxy of a company's network: which connections go through one, and how.

All connections of an agent are made by these rules: gRPC's, and those of enrolment that are not gRPC's.
The variables are those that gRPC reads. gRPC itself is told the outcome and does not look at them, because
its versions differ in how they read `no_proxy`.
"""

import ipaddress
import os
import re
import socket
from base64 import b64encode
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ecavg.common import addresses
from ecavg.common.addresses import Address
from ecavg.common.errors import UnavailableError, UsageError, one_line

# The first of these variables that has a value counts.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXEMPT_VARIABLES = ("no_grpc_proxy", "no_proxy")

# The port that the URL of a proxy means if it names none.
_HTTP_PORT = 80
# The beginning of the error of http.client for a proxy that does not open the tunnel.
_NO_TUNNEL = "Tunnel connection failed: "
_REMEDY = "write http://HOST:PORT, or list the server in no_proxy to reach it directly"


class Proxy(NamedTuple):
    """A proxy that takes the method CONNECT."""

    variable: str
    """The environment variable that names the proxy."""
    address: Address
    credentials: str
    """Name and password as "name:password"; "" if the proxy needs none."""

    def __str__(self) -> str:
        """Return the proxy for messages, without its credentials."""
        return f"the proxy http://{self.address} ({self.variable})"

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that show the credentials: RFC 7617."""
        if not self.credentials:
            return {}
        return {"Proxy-Authorization": f"Basic {b64encode(self.credentials.encode()).decode()}"}


def find(server: str, environ: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy through which to connect to the server; None: there is none on the way.

    Args:
        server: host and port.

    Raises:
        UsageError: the variable that counts names something else than an HTTP proxy.
    """
    variable, url = _first_value(PROXY_VARIABLES, environ)
    _, exempt = _first_value(EXEMPT_VARIABLES, environ)
    if not url or _is_exempt(addresses.parse(server).host, exempt):
        return None
    return _parse(variable, url)


def route(server: str) -> str:
    """Return the server for messages, and the proxy on the way to it if there is one.

    Raises:
        UsageError: as for `find`.
    """
    proxy = find(server)
    return f"{server} through {proxy}" if proxy else server


def route_of_download(url: str) -> str:
    """Return the URL of a download for messages, and the variable of the proxy on the way if there is one.

    urllib makes downloads, and reads fewer variables than `find`.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    has_proxy = scheme in getproxies() and host and not proxy_bypass(host)
    return f"{url} through the proxy of {scheme}_proxy" if has_proxy else url


def connect(server: str, seconds: float) -> socket.socket:
    """Return a connection to the server, each step of which has so many seconds.

    Raises:
        OSError: nobody answers.
        UnavailableError: the proxy does not connect, or is none.
        UsageError: as for `find`.
    """
    proxy = find(server)
    host, port = addresses.parse(server)
    if proxy is None:
        return socket.create_connection((host, port), seconds)
    tunnel = HTTPConnection(*proxy.address, timeout=seconds)
    # http.client puts no brackets around an IPv6 address.
    tunnel.set_tunnel(server.rpartition(":")[0], port, {"Host": server, **proxy.headers})
    _open(tunnel)
    connection: socket.socket = tunnel.sock
    return connection


def _open(tunnel: HTTPConnection) -> None:
    """Connect to the proxy and have it connect to the server; the errors are those of `connect`."""
    try:
        tunnel.connect()
    except OSError as error:
        tunnel.close()
        answer = str(error)
        if not answer.startswith(_NO_TUNNEL):
            raise
        raise UnavailableError(f"the proxy answers {one_line(answer.removeprefix(_NO_TUNNEL))}") from error
    except HTTPException as error:
        tunnel.close()
        raise UnavailableError("the proxy does not speak HTTP") from error


def _first_value(names: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the first variable that has a value, in lower or upper case, and the value; "" if none has."""
    for name in names:
        for variable in (name, name.upper()):
            if value := environ.get(variable, "").strip():
                return variable, value
    return "", ""


def _is_exempt(host: str, entries: str) -> bool:
    """Return True if an entry of the list is the host, a domain or network that it is in, or "*"."""
    return any(entry == "*" or _covers(entry, host) for entry in re.split(r"[,\s]+", entries) if entry)


def _covers(entry: str, host: str) -> bool:
    """Return True if the entry is the host, or a network or a domain that the host is in."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        domain = entry.lower().removeprefix("*").strip(".")
        return bool(domain) and f".{host.lower().rstrip('.')}".endswith(f".{domain}")
    try:
        return address in ipaddress.ip_network(re.sub(r"[\[\]]", "", entry), strict=False)
    except ValueError:
        return False


def _parse(variable: str, url: str) -> Proxy:
    """Return the proxy with this URL, or raise UsageError, which must not show the password."""
    scheme = re.match(r"([a-z][a-z0-9+.-]{1,20})://", url, re.IGNORECASE)
    if scheme and scheme[1].lower() != "http":
        raise UsageError(f"{variable} names a proxy of the kind {scheme[1]}://: {_REMEDY}")
    try:
        parts = urlsplit(url if scheme else "")
        port = _HTTP_PORT if parts.port is None else parts.port
        address = addresses.parse(str(Address(parts.hostname or "", port)))
    # The error of urllib quotes a part of the URL, which may be the password.
    except ValueError:
        raise UsageError(f"{variable} is not the URL of a proxy: {_REMEDY}") from None
    has_credentials = "@" in parts.netloc
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return Proxy(variable, address, credentials if has_credentials else "")
