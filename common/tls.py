"""Keys, certificates and join tokens: what both sides must agree on. ECDSA P-256, X.509, PEM throughout.

Three kinds of certificate are verified with one of two kinds of root:

    CA, long-lived             signs the one server (SERVER_NAME) and every agent (common name: its id)
    root of a join token       signs whoever enrolls with the token, and is thrown away with it

A join token is `ecavg1.` and base64url(SHA-256 of the CA's certificate ‖ 32 secret bytes). Both sides derive
a key from the secret; the server keeps its public half as a root. So the secret never travels, nothing that
is stored on the server can be used, and only holders of a live token come through the handshake.
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

from common.config import AGENT_ID_PATTERN
from common.errors import InvalidError, UsageError
from common.files import replacing

SERVER_NAME = "server.ecavg"  # fixed: a device needs neither DNS nor a server that keeps its address

CA_LIFETIME = timedelta(days=30 * 365)
SERVER_LIFETIME = timedelta(days=365)
AGENT_LIFETIME = timedelta(days=90)
CLOCK_SKEW = timedelta(days=1)  # by which a device's clock may be behind the server's

_TOKEN = re.compile(r"ecavg1\.([A-Za-z0-9_-]{86})")
_TOKEN_PURPOSE = b"ecavg join token 1"
_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # FIPS 186-4, D.1.2.3
# A token's end is the server's to decide; a device may not know the date yet.
_ANY_TIME = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate


class TlsMaterial(NamedTuple):
    """What one side of a connection shows and believes; PEM."""

    key: bytes
    certificate: bytes
    roots: bytes  # what the other side's certificate must be issued by


class JoinToken(NamedTuple):
    """What lets a device enroll, and tells it which server to believe."""

    fingerprint: bytes  # SHA-256 of the CA's certificate, DER
    secret: bytes  # 32

    @classmethod
    def new(cls, ca: Certificate) -> "JoinToken":
        return cls(fingerprint(ca), secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        """Raises UsageError."""
        match = _TOKEN.fullmatch(text.strip())
        if not match:
            raise UsageError(
                "this is no join token: it is one word, ecavg1.…, as the cloud-server printed it"
            )
        both = base64.urlsafe_b64decode(match[1] + "==")
        return cls(both[:32], both[32:])

    def __str__(self) -> str:
        return "ecavg1." + base64.urlsafe_b64encode(self.fingerprint + self.secret).decode().rstrip("=")

    @property
    def key(self) -> Key:
        """48 bytes of HKDF make the bias of the reduction negligible (FIPS 186-4, B.4.1)."""
        wide = HKDF(hashes.SHA256(), 48, salt=None, info=_TOKEN_PURPOSE).derive(self.secret)
        return ec.derive_private_key(int.from_bytes(wide) % (_CURVE_ORDER - 1) + 1, _CURVE)

    @property
    def token_id(self) -> str:
        """Its name in lists; tells nothing of the secret."""
        return key_digest(self.key.public_key())[:16]

    def root(self) -> Certificate:
        """What the server keeps."""
        name = _token_name(self.token_id)
        return _sign(name, self.key.public_key(), name, self.key, _ANY_TIME, *_as_authority())

    def leaf(self, key: Key) -> Certificate:
        """What the enrolling device shows; `key` is its own."""
        purpose = _as_leaf(ExtendedKeyUsageOID.CLIENT_AUTH, x509.UniformResourceIdentifier("ecavg:token"))
        return _sign("token", key.public_key(), _token_name(self.token_id), self.key, _ANY_TIME, *purpose)


def new_key() -> Key:
    return ec.generate_private_key(_CURVE)


def make_ca(key: Key, now: datetime) -> Certificate:
    """A CA of its own name, so that errors tell two servers apart."""
    name = f"ECAvg CA {secrets.token_hex(4)}"
    return _sign(name, key.public_key(), name, key, _lifetime(now, CA_LIFETIME), *_as_authority())


def make_server_certificate(ca: Certificate, ca_key: Key, key: PublicKey, now: datetime) -> Certificate:
    """Of the one server that this CA vouches for."""
    purpose = _as_leaf(ExtendedKeyUsageOID.SERVER_AUTH, x509.DNSName(SERVER_NAME))
    return _sign(SERVER_NAME, key, ca, ca_key, _lifetime(now, SERVER_LIFETIME), *purpose)


def make_agent_certificate(
    ca: Certificate, ca_key: Key, key: PublicKey, agent_id: str, now: datetime
) -> Certificate:
    """Of an agent. It names no host, so that nobody can take it for the server's."""
    purpose = _as_leaf(ExtendedKeyUsageOID.CLIENT_AUTH, x509.UniformResourceIdentifier("ecavg:agent"))
    return _sign(agent_id, key, ca, ca_key, _lifetime(now, AGENT_LIFETIME), *purpose)


def make_request(key: Key, agent_id: str) -> bytes:
    """A PKCS#10 request, DER."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(agent_id))
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def read_request(request: bytes) -> tuple[str, PublicKey]:
    """Agent id and key of a PKCS#10 request.

    Raises:
        InvalidError: it is none, is not signed with its own key, or has another kind of key or name.
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
    """Directly, signature included."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(certificate: Certificate) -> bytes:
    """SHA-256 of the DER."""
    return certificate.fingerprint(hashes.SHA256())


def token_id_of(certificate: Certificate) -> str | None:
    """Of which join token it says that it comes; to be held against the token's root."""
    kind, _, token_id = _common_name_of(certificate.issuer).partition(" ")
    return token_id if kind == "token" else None


def renewal_time(certificate: Certificate) -> datetime:
    """When a third of its lifetime is left."""
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return ends - (ends - starts) / 3


def common_name(named: Certificate | x509.CertificateSigningRequest) -> str:
    return _common_name_of(named.subject)


def key_digest(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def is_key_of(key: Key, certificate: Certificate) -> bool:
    try:
        return key.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False


# --- files -------------------------------------------------------------------------------------------


def pem(thing: Key | Certificate) -> bytes:
    if isinstance(thing, Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(content: bytes) -> Certificate:
    """The first one of a PEM file; ValueError."""
    return x509.load_pem_x509_certificate(content)


def read_certificates(path: Path) -> list[Certificate]:
    """In the order of the file. Raises FileNotFoundError, and UsageError for what is no certificate."""
    with _readable(path):
        return x509.load_pem_x509_certificates(path.read_bytes())


def read_key(path: Path) -> Key:
    """Raises FileNotFoundError, and UsageError for what is no ECDSA P-256 key."""
    with _readable(path):
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not an ECDSA P-256 key")
        return key


def read_or_make_key(path: Path) -> Key:
    try:
        return read_key(path)
    except FileNotFoundError:
        key = new_key()
        write_private(path, pem(key))
        return key


def write_private(path: Path, content: bytes) -> None:
    """The whole file or none, mode 0600."""
    with replacing(path, mode=0o600) as partial:
        partial.write_bytes(content)


def make_private_folder(path: Path) -> None:
    """Mode 0700; its parents are made as usual."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)  # also one that was made with other rights


# --- how certificates are made -----------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
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
    starts, ends = validity
    if isinstance(issuer, str):
        issuer_name, authority = _name(issuer), _key_identifier(issuer_key.public_key())
    else:  # what is verified with a certificate carries its names to the letter, and ends with it
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
    try:
        return issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = issuer.public_key()
        assert isinstance(key, PublicKey)
        return _key_identifier(key)


def _as_authority() -> tuple[tuple[x509.ExtensionType, bool], ...]:
    return (x509.BasicConstraints(ca=True, path_length=0), True), (_usage(signs_certificates=True), True)


def _as_leaf(
    purpose: x509.ObjectIdentifier, name: x509.GeneralName
) -> tuple[tuple[x509.ExtensionType, bool], ...]:
    return (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (x509.SubjectAlternativeName([name]), False),
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
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


def _lifetime(now: datetime, length: timedelta) -> tuple[datetime, datetime]:
    return now - min(CLOCK_SKEW, length), now + length


def _token_name(token_id: str) -> str:
    return f"token {token_id}"


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _common_name_of(name: x509.Name) -> str:
    values = [attribute.value for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return str(values[0]) if len(values) == 1 else ""
