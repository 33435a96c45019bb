"""The identity of this agent: a key that never leaves the device, and a certificate for it.

STATE/tls/key.pem        made here, before anything is asked for
STATE/tls/identity.pem   the agent's certificate and the CA that it believes; there once it has enrolled
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from ecavg.common import clock, proxy, tls
from ecavg.common.errors import ECAvgError, UsageError

_Result = TypeVar("_Result")

PROBE_SECONDS = 5.0

NOT_OUR_SERVER = "the server is not the one that this agent enrolled with (its certificate is of another CA)"


class EndedError(UsageError):
    """An error for an agent whose certificate has ended, by the clock of the server and of the device."""


class Identity:
    """The key and certificate of an enrolled agent.

    Raises:
        UsageError: the files cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = tls.read_key(folder / "key.pem")
        certificates = tls.read_certificates(folder / "identity.pem")
        if len(certificates) != 2:
            raise UsageError(
                f"{folder / 'identity.pem'} should have two certificates, and has {len(certificates)}:"
                f" restore it, or remove {folder} and enroll anew"
            )
        self._certificate, self._ca = certificates

    @property
    def agent_id(self) -> str:
        """Return the id that the certificate names."""
        return tls.common_name(self._certificate)

    @property
    def ends_at(self) -> datetime:
        """Return when the certificate ends."""
        return self._certificate.not_valid_after_utc

    @property
    def renews_at(self) -> datetime:
        """Return when the certificate should be renewed."""
        return tls.renewal_time(self._certificate, self._ca)

    @property
    def material(self) -> tls.TlsMaterial:
        """Return the TLS material for connections."""
        return tls.TlsMaterial(tls.pem(self._key), tls.pem(self._certificate), tls.pem(self._ca))

    @property
    def probe(self) -> ssl.SSLContext:
        """Return the same for a connection by Python's own TLS, whose handshake ends as that of gRPC."""
        # A default context would also open the file that the variable SSLKEYLOGFILE names.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=tls.pem(self._ca).decode())
        context.load_cert_chain(self._folder / "identity.pem", self._folder / "key.pem")
        context.set_alpn_protocols(["h2"])
        return context

    def request(self) -> bytes:
        """Return a request for a new certificate for the same key."""
        return tls.make_request(self._key, self.agent_id)

    def validity_of_server(self, leaf: tls.Certificate) -> tuple[datetime, datetime] | None:
        """Return from when until when this device can believe a server; None: it is of another CA."""
        return tls.validity(leaf, self._ca) if tls.is_issued_by(leaf, self._ca) else None

    def renew(self, certificate: bytes) -> None:
        """Go on with this certificate, durably.

        Raises:
            UsageError: the certificate is not this agent's; nothing is changed.
        """
        try:
            new = tls.load_certificate(certificate)
        except ValueError as error:
            raise UsageError("the server sent something else than a certificate") from error
        if not (tls.is_key_of(self._key, new) and tls.is_issued_by(new, self._ca)):
            raise UsageError("the server sent a certificate that is not for this agent's key")
        tls.write_private(self._folder / "identity.pem", tls.pem(new) + tls.pem(self._ca))
        self._certificate = new


def find(folder: Path) -> Identity | None:
    """Return the identity in a folder; None: this agent has not enrolled."""
    with suppress(FileNotFoundError):
        return Identity(folder)
    return None


def explain(server: str, identity: Identity | None, trouble: str) -> str:
    """Return what is behind a failed connection, where it is more than a network that is down.

    Args:
        trouble: what gRPC says of it.

    Raises:
        EndedError: the server does not take this agent's certificate, which has ended.
    """
    if identity is None:
        return SPEAKS_TLS if "closed" in trouble and _speaks_tls(server) else trouble
    if "WRONG_VERSION_NUMBER" in trouble:
        return _SPEAKS_PLAINTEXT
    # gRPC says no more than this of a handshake that the other side ends.
    is_broken_off = "failed to connect" in trouble and ("closed" in trouble or "reset" in trouble)
    if not is_broken_off and "CERTIFICATE_VERIFY_FAILED" not in trouble:
        return trouble
    try:
        return distrust(server, identity) or trouble
    except EndedError:
        raise
    except (OSError, ValueError, ECAvgError):
        return trouble


def distrust(server: str, identity: Identity) -> str:
    """Return why server and agent do not believe each other's certificates; "": they do.

    Raises:
        EndedError: the server does not take this agent's certificate, which has ended.
        OSError: nobody answers.
        UnavailableError: the proxy on the way does not connect.
        UsageError: whoever answers speaks plaintext.
        ValueError: whoever answers shows no certificate.
    """
    validity = identity.validity_of_server(tls.load_certificate(certificate_of(server)))
    if validity is None:
        return f"{NOT_OUR_SERVER}: check --server, or enroll anew"
    if is_outside(validity):
        return wrong_clock(validity)
    return _explain_refusal(identity) if _is_turned_away(server, identity) else ""


def is_outside(validity: tuple[datetime, datetime]) -> bool:
    """Return True if a certificate is not valid by this device's clock."""
    starts, ends = validity
    return not starts.timestamp() <= time.time() < ends.timestamp()


def wrong_clock(validity: tuple[datetime, datetime]) -> str:
    """Return the line for a device whose clock is outside the validity of the server's certificate."""
    starts, ends = validity
    return (
        f"this device's clock says {clock.day(time.time())}, and the server's certificate is valid from"
        f" {starts:%Y-%m-%d} until {ends:%Y-%m-%d}: set the clock ({clock.HOW_TO_SET})"
    )


def _explain_refusal(identity: Identity) -> str:
    """Return why the server turns this agent's certificate away, where only the clocks may be wrong.

    Raises:
        EndedError: the certificate has ended by the clock of this device, too.
    """
    ends, today = f"{identity.ends_at:%Y-%m-%d}", clock.day(time.time())
    if identity.ends_at.timestamp() <= time.time():
        raise EndedError(
            f"this agent's certificate ended on {ends}, by the server's clock and by this device's ({today})"
        )
    return (
        f"the server turns this agent's certificate away, which is valid until {ends}, while this device's"
        f" clock says {today}: set the clock that is wrong ({clock.HOW_TO_SET}), or enroll anew"
    )


def _is_turned_away(server: str, identity: Identity) -> bool:
    """Return True if the server proves that it is ours, and then ends the connection over our certificate.

    In TLS 1.3 the handshake of this side is over before the server looks at the certificate. A server that
    takes the certificate begins to speak, and gRPC's server does not say why it ends the connection.
    """
    with _connected(server, identity.probe) as asked:
        try:
            return not asked.receive()
        except TimeoutError:
            return False
        except OSError:
            return True


SPEAKS_TLS = (
    "the server speaks TLS and this agent plaintext: leave --insecure away, after `edge-agent enroll`"
)
_SPEAKS_PLAINTEXT = (
    "the server speaks plaintext and this agent TLS: start the server without --insecure, or both with it"
)


def certificate_of(server: str) -> bytes:
    """Return the certificate, PEM and unverified, of whoever answers at the address.

    Raises:
        OSError: nobody answers.
        UnavailableError: the proxy on the way does not connect.
        UsageError: whoever answers speaks plaintext.
    """
    # As above: a default context would open the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(server, context) as asked:
            return ssl.DER_cert_to_PEM_cert(asked.certificate).encode()
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise UsageError(_SPEAKS_PLAINTEXT) from error
        raise


@contextmanager
def _connected(server: str, context: ssl.SSLContext) -> Iterator["_Tls"]:
    """Connect to the server, and yield the connection after the handshake of this side."""
    with proxy.connect(server, PROBE_SECONDS) as connection:
        yield _Tls(connection, context)


class _Tls:
    """TLS over a socket, which stays its owner's to close.

    `SSLContext.wrap_socket` takes the socket over, and leaves it open if the other side resets the connection
    before the handshake begins.

    Raises:
        OSError: the handshake fails.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        # Asked for by the address, a server would complain in its log that it has no such name.
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=tls.SERVER_NAME)
        self._take(self._tls.do_handshake)

    @property
    def certificate(self) -> bytes:
        """Return the certificate of the other side, in DER; empty: it has none."""
        return self._tls.getpeercert(binary_form=True) or b""

    def receive(self) -> bytes:
        """Wait for the other side's next byte; empty: it has ended the connection."""
        return self._take(lambda: self._tls.read(1))

    def _take(self, step: Callable[[], _Result]) -> _Result:
        """Repeat a step of the protocol until it has received what it waits for, and send what it says."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._send()
                if received := self._connection.recv(1 << 14):
                    self._received.write(received)
                else:
                    self._received.write_eof()
            else:
                self._send()
                return result

    def _send(self) -> None:
        self._connection.sendall(self._to_send.read())


def _speaks_tls(server: str) -> bool:
    try:
        return bool(certificate_of(server))
    except (OSError, ECAvgError):
        return False
