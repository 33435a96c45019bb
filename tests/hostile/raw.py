"""What no gRPC library would send: sockets, and HTTP/2 frames by hand (RFC 9113, RFC 7541)."""

import resource
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecavg.common.pb import ecavg_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ECAvg"].full_name

HEADERS, RST_STREAM, SETTINGS, CONTINUATION = 1, 3, 4, 9
END_HEADERS = 4
CANCEL = (8).to_bytes(4, "big")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def field(name: str, value: str) -> bytes:
    """Return a header field as a literal, not indexed."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode("ascii") for text in (name, value))


def call_head(method: str) -> bytes:
    """Return the header block of a call."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/{SERVICE}/{method}",
        ":authority": "server.ecavg",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(field(name, value) for name, value in fields.items())


def open_call(method: str, stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, call_head(method))


def tls_context(folder: Path) -> ssl.SSLContext:
    """Of the agent that is enrolled in `folder`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(folder / "tls/identity.pem", folder / "tls/key.pem")
    context.set_alpn_protocols(["h2"])
    return context


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has ended it; what it has said is read and forgotten."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def connections(port: int, number: int) -> Iterator[list[socket.socket]]:
    """So many, over which nothing has been said yet, or as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made: list[socket.socket] = []
    try:
        for count in range(min(number, hard - 500)):
            made.append(socket.socket())
            made[-1].settimeout(5)
            made[-1].connect(("127.0.0.1", port))
            if count % 200 == 0:
                time.sleep(0.01)  # or it would be the kernel's queue that is full
        yield made
    finally:
        for connection in made:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def send(connection: socket.socket, messages: Iterable[bytes]) -> int:
    """How many messages could be sent before the other end closed the connection."""
    num_sent = 0
    with suppress(OSError):
        for message in messages:
            connection.sendall(message)
            num_sent += 1
    return num_sent
