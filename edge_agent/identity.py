"""The identity of this agent: a key that never leaves the device, and a certificate for it.

STATE/tls/key.pem        made here, before anything is asked for
STATE/tls/identity.pem   the agent's certificate and the CA that it believes; there once it has enrolled
"""

import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from common import tls
from common.errors import UsageError

PROBE_SECONDS = 5.0

NOT_OUR_SERVER = "the server is not the one that this agent enrolled with (its certificate is of another CA)"


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
        return tls.renewal_time(self._certificate)

    @property
    def material(self) -> tls.TlsMaterial:
        """Return the TLS material for connections."""
        return tls.TlsMaterial(tls.pem(self._key), tls.pem(self._certificate), tls.pem(self._ca))

    def request(self) -> bytes:
        """Return a request for a new certificate for the same key."""
        return tls.make_request(self._key, self.agent_id)

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
    """
    if identity is None:
        return _SPEAKS_TLS if "closed" in trouble and _speaks_tls(server) else trouble
    if "WRONG_VERSION_NUMBER" in trouble:
        return _SPEAKS_PLAINTEXT
    if "CERTIFICATE_VERIFY_FAILED" in trouble:
        return f"{NOT_OUR_SERVER}: check --server, or enroll anew"
    if identity.ends_at <= datetime.now(UTC):
        return f"this agent's certificate ended on {identity.ends_at:%Y-%m-%d}: enroll anew"
    return trouble


_SPEAKS_TLS = (
    "the server speaks TLS and this agent plaintext: leave --insecure away, after `edge-agent enroll`"
)
_SPEAKS_PLAINTEXT = (
    "the server speaks plaintext and this agent TLS: start the server without --insecure, or both with it"
)


def certificate_of(server: str) -> bytes:
    """Return the certificate, PEM and unverified, of whoever answers at the address."""
    host, _, port = server.rpartition(":")
    # A default context would also open the file that the variable SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS) as connection,
            # Asked for by the address, a server would complain in its log that it has no such name.
            context.wrap_socket(connection, server_hostname=tls.SERVER_NAME) as asked,
        ):
            return ssl.DER_cert_to_PEM_cert(asked.getpeercert(binary_form=True) or b"").encode()
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise UsageError(_SPEAKS_PLAINTEXT) from error
        raise
    except UnicodeError as error:
        # Python encodes the name of a host before it looks for it.
        raise UsageError(f"{host!r} cannot be the name of a host: check --server") from error


def _speaks_tls(server: str) -> bool:
    try:
        return bool(certificate_of(server))
    except (OSError, UsageError):
        return False
