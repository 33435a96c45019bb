"""Keys, certificates and join tokens of both sides. All keys are ECDSA P-256, all certificates X.509 in PEM.

There are two kinds of root certificate, which sign three kinds of certificate:

    the CA of a server         signs the server (SERVER_NAME) and every agent (common name: the agent id)
    the root of a join token   signs a device that enrolls with the token; the server drops it with the token

A join token is `ecavg1.` and base64url(SHA-256 of the CA's certificate ‖ 32 secret bytes). Both sides derive
the same key from the secret. The server keeps only the public half of that key, as a root certificate.
Therefore the secret never travels after the token has been handed over, the files of the server do not
contain a usable token, and only the holder of a live token passes the TLS handshake.
"""

import base64
import hashlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ecavg.common.config import AGENT_ID_PATTERN
from ecavg.common.errors import InvalidError, UsageError
from ecavg.common.files import replacing

# The name is fixed, so that an agent recognises the server without DNS and at any address.
SERVER_NAME = "server.ecavg"

# An agent renews its certificate when a third of this time is left.
AGENT_LIFETIME = timedelta(days=90)
# Every certificate holds from here on, because a device without a battery starts with this time.
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
# RFC 5280, section 4.1.2.5, has this end for a certificate that does not end.
NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

_TOKEN = re.compile(r"ecavg1\.([A-Za-z0-9_-]{86})")
_TOKEN_PURPOSE = b"ecavg join token 1"
_CURVE = ec.SECP256R1()
# Source: FIPS 186-4, section D.1.2.3.
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# Only agents' certificates end, and by the server's clock alone. An end of the others would protect nothing:
# the keys of CA and server lie side by side, and the server decides when a token expires. But it would shut
# out every device whose clock is wrong.
_ANY_TIME = BEGINNING, NEVER

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate


class TlsMaterial(NamedTuple):
    """The key, the certificate and the trusted roots of one side of a connection, all in PEM."""

    key: bytes
    certificate: bytes
    roots: bytes
    """One of these root certificates must have issued the other side's certificate."""


class JoinToken(NamedTuple):
    """A token that lets a device enroll, and identifies the server that the device may trust."""

    fingerprint: bytes
    """The SHA-256 digest of the CA's certificate in DER, 32 bytes."""
    secret: bytes
    """32 random bytes."""

    @classmethod
    def new(cls, ca: Certificate) -> "JoinToken":
        """Return a token with a new secret for the server with this CA."""
        return cls(fingerprint(ca), secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        """Return the token that is written as `text`.

        Raises:
            UsageError: the text is not a join token.
        """
        match = _TOKEN.fullmatch(text.strip())
        if not match:
            raise UsageError(
                "this is no join token: it is one word, ecavg1.…, as the cloud-server printed it"
            )
        decoded = base64.urlsafe_b64decode(match[1] + "==")
        return cls(decoded[:32], decoded[32:])

    def __str__(self) -> str:
        return "ecavg1." + base64.urlsafe_b64encode(self.fingerprint + self.secret).decode().rstrip("=")

    @property
    def key(self) -> Key:
        """Return the private key that is derived from the secret (FIPS 186-4, section B.4.1)."""
        # 48 bytes, 16 more than the order has, make the bias of the reduction negligible.
        derived = HKDF(hashes.SHA256(), 48, salt=None, info=_TOKEN_PURPOSE).derive(self.secret)
        return ec.derive_private_key(int.from_bytes(derived) % (_CURVE_ORDER - 1) + 1, _CURVE)

    @property
    def token_id(self) -> str:
        """Return the name of the token in lists, 16 hex digits that do not reveal the secret."""
        return key_digest(self.key.public_key())[:16]

    def root(self) -> Certificate:
        """Return the root certificate of the token, which the server keeps."""
        name = _token_name(self.token_id)
        return _sign(name, self.key.public_key(), name, self.key, _ANY_TIME, *_authority_extensions())

    def leaf(self, key: Key) -> Certificate:
        """Return the certificate that a device shows while it enrolls.

        Args:
            key: the device's own key.
        """
        purpose = _leaf_extensions(
            ExtendedKeyUsageOID.CLIENT_AUTH, x509.UniformResourceIdentifier("ecavg:token")
        )
        return _sign("token", key.public_key(), _token_name(self.token_id), self.key, _ANY_TIME, *purpose)


def new_key() -> Key:
    """Return a new random private key."""
    return ec.generate_private_key(_CURVE)


def make_ca(key: Key) -> Certificate:
    """Return a CA certificate with a random name, so that error messages tell two servers apart."""
    name = f"ECAvg CA {secrets.token_hex(4)}"
    return _sign(name, key.public_key(), name, key, _ANY_TIME, *_authority_extensions())


def make_server_certificate(ca: Certificate, ca_key: Key, key: PublicKey) -> Certificate:
    """Return the certificate of the one server of this CA, which ends with the CA."""
    purpose = _leaf_extensions(ExtendedKeyUsageOID.SERVER_AUTH, x509.DNSName(SERVER_NAME))
    return _sign(SERVER_NAME, key, ca, ca_key, _ANY_TIME, *purpose)


def make_agent_certificate(
    ca: Certificate, ca_key: Key, key: PublicKey, agent_id: str, now: datetime
) -> Certificate:
    """Return an agent's certificate, which names no host and therefore cannot pass for the server's."""
    purpose = _leaf_extensions(ExtendedKeyUsageOID.CLIENT_AUTH, x509.UniformResourceIdentifier("ecavg:agent"))
    return _sign(agent_id, key, ca, ca_key, (BEGINNING, now + AGENT_LIFETIME), *purpose)


def make_request(key: Key, agent_id: str) -> bytes:
    """Return a request for an agent's certificate: PKCS#10 in DER."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(agent_id))
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def read_request(request: bytes) -> tuple[str, PublicKey]:
    """Return the agent id and the public key of a PKCS#10 request in DER.

    Raises:
        InvalidError: the bytes are not a request, the request is not signed with its own key, the key is not
            ECDSA P-256, or the common name is not an agent id.
    """
    try:
        csr = x509.load_der_x509_csr(request)
        key, agent_id = csr.public_key(), common_name(csr)
        is_signed = csr.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise InvalidError("this is no request for a certificate (PKCS#10, DER)") from error
    if not (is_signed and isinstance(key, PublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise InvalidError("a request for a certificate must be signed with its own ECDSA P-256 key")
    if not re.fullmatch(AGENT_ID_PATTERN, agent_id):
        raise InvalidError("an agent id is 1 to 64 letters, digits, '.', '_' or '-', first a letter or digit")
    return agent_id, key


def is_issued_by(certificate: Certificate, issuer: Certificate) -> bool:
    """Return True if `issuer` has directly issued the certificate, with a valid signature."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(certificate: Certificate) -> bytes:
    """Return the SHA-256 digest of the certificate in DER, 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def token_id_of(certificate: Certificate) -> str | None:
    """Return the id of the join token that the certificate names as its issuer, or None.

    The name proves nothing: the caller must check the certificate against the root of that token.
    """
    kind, _, token_id = _common_name_of(certificate.issuer).partition(" ")
    return token_id if kind == "token" else None


def renewal_time(certificate: Certificate, ca: Certificate) -> datetime:
    """Return when an agent's certificate should be renewed: a third of AGENT_LIFETIME is then left.

    A certificate that ends with its CA is never renewed, because the next one would end no later.
    """
    ends = certificate.not_valid_after_utc
    return NEVER if ends >= ca.not_valid_after_utc else ends - AGENT_LIFETIME / 3


def validity(*certificates: Certificate) -> tuple[datetime, datetime]:
    """Return the first and the last moment at which all of the certificates are valid."""
    return (
        max(each.not_valid_before_utc for each in certificates),
        min(each.not_valid_after_utc for each in certificates),
    )


def common_name(named: Certificate | x509.CertificateSigningRequest) -> str:
    """Return the common name of the subject, or "" unless there is exactly one."""
    return _common_name_of(named.subject)


def key_digest(key: PublicKey) -> str:
    """Return the SHA-256 digest of the key's SubjectPublicKeyInfo in DER, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def is_key_of(key: Key, certificate: Certificate) -> bool:
    """Return True if the certificate is for the public half of this key."""
    try:
        return key.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False


# --- files -------------------------------------------------------------------------------------------


def pem(key_or_certificate: Key | Certificate) -> bytes:
    """Return a certificate, or a private key without encryption, in PEM."""
    if isinstance(key_or_certificate, Certificate):
        return key_or_certificate.public_bytes(Encoding.PEM)
    return key_or_certificate.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(content: bytes) -> Certificate:
    """Return the first certificate in the content of a PEM file.

    Raises:
        ValueError: the content has no readable certificate.
    """
    return x509.load_pem_x509_certificate(content)


def read_certificates(path: Path) -> list[Certificate]:
    """Return the certificates in a PEM file, in the order of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        UsageError: the file does not contain readable certificates.
    """
    with _unreadable_is_usage_error(path):
        return x509.load_pem_x509_certificates(path.read_bytes())


def read_key(path: Path) -> Key:
    """Return the private key in a PEM file.

    Raises:
        FileNotFoundError: the file does not exist.
        UsageError: the file does not contain a readable ECDSA P-256 key.
    """
    with _unreadable_is_usage_error(path):
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not an ECDSA P-256 key")
        return key


def read_or_make_key(path: Path) -> Key:
    """Return the private key in a PEM file; write a new key to the file if it does not exist.

    Raises:
        UsageError: the file does not contain a readable ECDSA P-256 key.
    """
    try:
        return read_key(path)
    except FileNotFoundError:
        key = new_key()
        write_private(path, pem(key))
        return key


def write_private(path: Path, content: bytes) -> None:
    """Write a file with mode 0600 atomically: a reader never sees an incomplete file."""
    with replacing(path, mode=0o600) as partial:
        partial.write_bytes(content)


def make_private_folder(path: Path) -> None:
    """Make a folder with mode 0700, and its missing parents with the default mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    # The folder may have existed with another mode.
    path.chmod(0o700)


# --- how certificates are made -----------------------------------------------------------------------


@contextmanager
def _unreadable_is_usage_error(path: Path) -> Iterator[None]:
    """Turn the errors for a file at `path` that cannot be read, or not be understood, into UsageError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be used ({error}): remove it, or put the right one there") from error


def _sign(
    subject: str,
    key: PublicKey,
    issuer: Certificate | str,
    issuer_key: Key,
    validity: tuple[datetime, datetime],
    *extensions: tuple[x509.ExtensionType, bool],
) -> Certificate:
    """Return a certificate with a random serial number, signed with SHA-256.

    Args:
        subject: the common name of the holder.
        key: the public key of the holder.
        issuer: the certificate of the issuer, or the common name if there is no certificate of the issuer.
        issuer_key: the private key of the issuer.
        validity: the first and the last moment at which the certificate is valid.
        extensions: the extensions besides the two key identifiers, each with True if it is critical.
    """
    starts, ends = validity
    if isinstance(issuer, str):
        issuer_name, authority = _name(issuer), _key_identifier(issuer_key.public_key())
    # Verification compares the issuer's names byte by byte. It also refuses a certificate whose issuer has
    # expired, so the new certificate ends no later than the issuer's.
    else:
        issuer_name, authority = issuer.subject, _key_identifier_of(issuer)
        ends = min(ends, issuer.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer_name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(_key_identifier(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False
        )
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return builder.sign(issuer_key, hashes.SHA256())


def _key_identifier(key: PublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key)


def _key_identifier_of(issuer: Certificate) -> x509.SubjectKeyIdentifier:
    """Return the key identifier in the certificate, or the usual one if the certificate has none."""
    try:
        return issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = issuer.public_key()
        assert isinstance(key, PublicKey)
        return _key_identifier(key)


def _authority_extensions() -> tuple[tuple[x509.ExtensionType, bool], ...]:
    """Return the extensions of a root certificate, which may sign leaf certificates only."""
    return (x509.BasicConstraints(ca=True, path_length=0), True), (_usage(signs_certificates=True), True)


def _leaf_extensions(
    purpose: x509.ObjectIdentifier, name: x509.GeneralName
) -> tuple[tuple[x509.ExtensionType, bool], ...]:
    """Return the extensions of a certificate that may not sign others and serves this purpose only."""
    return (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (x509.SubjectAlternativeName([name]), False),
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the key usage for signing certificates, or else for signing TLS handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _token_name(token_id: str) -> str:
    return f"token {token_id}"


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _common_name_of(name: x509.Name) -> str:
    """Return the common name, or "" unless there is exactly one."""
    values = [attribute.value for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return str(values[0]) if len(values) == 1 else ""
