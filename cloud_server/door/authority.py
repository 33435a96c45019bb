"""The authority of a server: its CA, its join tokens, and the agents that have enrolled.

    TLS/ca.pem, ca.key          the CA; a CA that the operator puts there before the first start is used
    TLS/server.pem, server.key  the server's own certificate, which ends with the CA
    TLS/authority.sqlite3       tokens and agents

Any thread may call the methods, and other processes may have the same folder open meanwhile. A change that
`cloud-server token` or `cloud-server agents` makes there is in force from the running server's next call on.
"""

import fcntl
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from ecavg.cloud_server.disk.database import connect, migrate
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.common import clock, tls
from ecavg.common.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Reason,
    UnauthenticatedError,
    UsageError,
)
from ecavg.common.faults import Point, crash_point

# A migration is never edited; another one is added.
_MIGRATIONS = (
    """
    CREATE TABLE tokens (
        token_id TEXT PRIMARY KEY NOT NULL,
        root TEXT NOT NULL,  -- its public half, a certificate
        uses INTEGER NOT NULL,
        created_at REAL NOT NULL,
        expires_at REAL NOT NULL,
        revoked_at REAL
    );
    CREATE TABLE enrolments (
        token_id TEXT NOT NULL REFERENCES tokens (token_id),
        key TEXT NOT NULL,
        agent_id TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (token_id, key)
    );
    CREATE TABLE agents (
        agent_id TEXT PRIMARY KEY NOT NULL,
        key TEXT NOT NULL,
        token_id TEXT NOT NULL REFERENCES tokens (token_id),
        enrolled_at REAL NOT NULL,
        expires_at REAL NOT NULL,
        revoked_at REAL
    );
    """,
    # Only a token that is made after the revocation of an agent lets the agent come back. Clocks do not say
    # what came first, because they may be set in between; the numbers of the rows do.
    """
    ALTER TABLE agents ADD COLUMN last_token INTEGER NOT NULL DEFAULT 0;
    UPDATE agents SET last_token = coalesce(
        (SELECT max(tokens.rowid) FROM tokens WHERE tokens.created_at <= agents.revoked_at), 0);
    """,
)

_COMMANDS = {"tokens": "token", "agents": "agents"}
_ASK_OPERATOR = "ask its operator for another one (`cloud-server token create`)"

log = structlog.get_logger()


@dataclass(frozen=True)
class TokenRow:
    """The record of a join token."""

    # Tokens are numbered in the order in which they were made.
    number: int
    token_id: str
    uses: int
    num_used: int
    # All times here are in seconds since the epoch.
    created_at: float
    expires_at: float
    revoked_at: float | None

    def holds(self, now: float) -> bool:
        """Return True if the token has not expired, and was not made while the clock was ahead.

        A token of the future would otherwise let devices in until that future is over.
        """
        return self.created_at - clock.SET_BACK_SECONDS <= now < self.expires_at


@dataclass(frozen=True)
class EnrolledAgent:
    """The record of an agent that has enrolled."""

    agent_id: str
    # The SHA-256 digest of the agent's public key, hexadecimal; see `tls.key_digest`.
    key: str
    # The token with which the agent has enrolled.
    token_id: str
    enrolled_at: float
    # The agent's latest certificate is valid until this time.
    expires_at: float
    revoked_at: float | None
    # The number of the last token that was made before the revocation; 0: the agent is not revoked.
    last_token: int


class CaNotValidError(UsageError):
    """An error for a CA that has ended, or is not valid yet, by this machine's clock."""


class Holder(NamedTuple):
    """The holder of a certificate that this server has verified: an agent, or the holder of a join token.

    Exactly one of the two ids is set, but on a server without TLS both may be None.
    """

    agent_id: str | None
    token_id: str | None


class Authority:
    """A folder with keys and certificates, and with the records of tokens and agents.

    Args:
        folder: the server's --tls-dir, made with new keys if it does not exist.
        clock: returns seconds since the epoch; decides when tokens and certificates expire.

    Raises:
        UsageError: the folder cannot be used, or a key in it does not belong to its certificate.
        CaNotValidError: the CA that the operator put there has ended, or is not valid yet.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._writing, self._reading = threading.RLock(), threading.Lock()
        try:
            tls.make_private_folder(folder)
            with self._folder_locked():
                self._ca, self._ca_key = self._read_or_make_ca()
                self._server_key = tls.read_or_make_key(folder / "server.key")
                self._server = self._read_or_make_server_certificate()
                self._database = _open_database(folder / "authority.sqlite3")
                # Reading has a connection of its own, so that no call waits while an enrolment is flushed.
                self._reader = _open_database(folder / "authority.sqlite3")
        except (OSError, sqlite3.DatabaseError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise UsageError(
                f"cannot use {folder} ({what}): make it writable, or choose another --tls-dir"
            ) from error

    def close(self) -> None:
        """Close the database of tokens and agents."""
        with self._writing, self._reading:
            self._database.close()
            self._reader.close()

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the CA's certificate, hexadecimal."""
        return tls.fingerprint(self._ca).hex()

    @property
    def ends_at(self) -> float:
        """Return when the CA's certificate ends, and with it all others, in seconds since the epoch."""
        return self._ca.not_valid_after_utc.timestamp()

    @cached_property
    def ca_certificate(self) -> bytes:
        """Return the CA's certificate, PEM."""
        return tls.pem(self._ca)

    # The server's certificate, and the roots that it trusts

    def material(self) -> tls.TlsMaterial:
        """Return the key, the certificate and the roots for the next handshake.

        The roots are the CA and the live tokens.
        """
        now = self._clock()
        live = self._read(
            "SELECT root FROM tokens WHERE revoked_at IS NULL AND expires_at > ? AND created_at <= ?"
            " ORDER BY token_id",
            now,
            now + clock.SET_BACK_SECONDS,
        )
        roots = [self.ca_certificate, *(row["root"].encode() for row in live)]
        return tls.TlsMaterial(tls.pem(self._server_key), tls.pem(self._server), b"".join(roots))

    def _read_or_make_server_certificate(self) -> tls.Certificate:
        """Return the server's certificate; make a new one if there is none, or if it no longer serves."""
        path = self._folder / "server.pem"
        try:
            certificate = tls.read_certificates(path)[0]
            is_ours = tls.is_key_of(self._server_key, certificate) and tls.is_issued_by(certificate, self._ca)
            # One that was made under another rule, or for another CA, may end earlier.
            if is_ours and tls.validity(certificate, self._ca) == tls.validity(self._ca):
                return certificate
        except FileNotFoundError:
            pass
        public_key = self._server_key.public_key()
        certificate = tls.make_server_certificate(self._ca, self._ca_key, public_key)
        tls.write_private(path, tls.pem(certificate))
        return certificate

    def _read_or_make_ca(self) -> tuple[tls.Certificate, tls.Key]:
        """Return the CA's certificate and key; make the key if it is missing, and then its certificate."""
        certificate_path, key_path = self._folder / "ca.pem", self._folder / "ca.key"
        if certificate_path.exists() and not key_path.exists():
            raise UsageError(f"{certificate_path} is there and {key_path} is not: put the CA's key there")
        key = tls.read_or_make_key(key_path)
        crash_point(Point.SERVER_CA_KEY_WRITTEN)
        if not certificate_path.exists():
            tls.write_private(certificate_path, tls.pem(tls.make_ca(key)))
        certificate = tls.read_certificates(certificate_path)[0]
        if not tls.is_key_of(key, certificate):
            raise UsageError(f"{key_path} is not the key of {certificate_path}: put the right one there")
        self._check_validity(certificate_path, certificate)
        return certificate, key

    def _check_validity(self, path: Path, ca: tls.Certificate) -> None:
        """Raise CaNotValidError unless the CA is valid by this machine's clock."""
        starts, ends = tls.validity(ca)
        if not starts <= self._utc_now() < ends:
            raise CaNotValidError(
                f"{path} is valid from {starts:%Y-%m-%d} until {ends:%Y-%m-%d}, and this machine's clock says"
                f" {self._utc_now():%Y-%m-%d}: set the clock ({clock.HOW_TO_SET}), or put another CA there"
            )

    # Join tokens

    def create_token(self, uses: int, ttl_seconds: float) -> str:
        """Return a new join token.

        The server keeps only the public half of the token, so the token cannot be shown a second time.

        Args:
            uses: how many devices may enroll with the token.
            ttl_seconds: the lifetime of the token.
        """
        token = tls.JoinToken.new(self._ca)
        now = self._clock()
        with self._transaction() as database:
            database.execute(
                "INSERT INTO tokens (token_id, root, uses, created_at, expires_at) VALUES (?, ?, ?, ?, ?)",
                (token.token_id, tls.pem(token.root()).decode(), uses, now, now + ttl_seconds),
            )
        return str(token)

    @contextmanager
    def token_to_show(self, uses: int, ttl_seconds: float) -> Iterator[str]:
        """Make a join token for the body to show; it is revoked if the body raises, as nobody has seen it.

        Args:
            uses: as for `create_token`.
            ttl_seconds: as for `create_token`.
        """
        token = self.create_token(uses, ttl_seconds)
        try:
            yield token
        except BaseException:
            self.revoke_token(tls.JoinToken.parse(token).token_id)
            raise

    def tokens(self) -> list[TokenRow]:
        """Return every token that was ever made, the latest last."""
        rows = self._read(
            "SELECT rowid AS number, token_id, uses, created_at, expires_at, revoked_at,"
            " (SELECT count(*) FROM enrolments WHERE enrolments.token_id = tokens.token_id) AS num_used"
            " FROM tokens ORDER BY rowid"
        )
        return [TokenRow(**row) for row in rows]

    def revoke_token(self, token_id: str) -> None:
        """Revoke a token: nobody can enroll with it any more, but the agents that did stay enrolled.

        Raises:
            NotFoundError: there is no such token.
        """
        self._revoke("tokens", "token_id", token_id)

    # Agents

    def enroll(self, token_id: str, request: bytes) -> bytes:
        """Enroll a device that holds the token, and return the agent's certificate in PEM.

        A device that enrolls again with the same key and token does not use the token up.

        Args:
            token_id: the token that the device has shown.
            request: the request for a certificate, PKCS#10 in DER.

        Raises:
            ForbiddenError: the token is used up, has expired or was revoked, or is older than the
                revocation of the agent.
            ConflictError: another key is enrolled under this agent id, or this key under another agent id.
            InvalidError: the request is not valid; see `tls.read_request`.
        """
        agent_id, public_key = tls.read_request(request)
        key, now = tls.key_digest(public_key), self._clock()
        certificate = tls.make_agent_certificate(
            self._ca, self._ca_key, public_key, agent_id, self._utc_now()
        )
        with self._transaction() as database:
            if self._costs_a_use(self._live_token(token_id, now), agent_id, key):
                database.execute(
                    "INSERT INTO enrolments (token_id, key, agent_id, at) VALUES (?, ?, ?, ?)",
                    (token_id, key, agent_id, now),
                )
            database.execute(
                "INSERT OR REPLACE INTO agents (agent_id, key, token_id, enrolled_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (agent_id, key, token_id, now, certificate.not_valid_after_utc.timestamp()),
            )
        crash_point(Point.SERVER_ENROLMENT_RECORDED)
        return tls.pem(certificate)

    def renew(self, agent_id: str, request: bytes) -> bytes:
        """Return a new certificate, PEM, for an agent's key; raise InvalidError for any other key or name."""
        name, public_key = tls.read_request(request)
        agent = self._agent(agent_id)
        if name != agent_id or agent is None or tls.key_digest(public_key) != agent.key:
            raise InvalidError("a certificate is renewed for the agent and the key that it was issued to")
        certificate = tls.make_agent_certificate(
            self._ca, self._ca_key, public_key, agent_id, self._utc_now()
        )
        with self._transaction() as database:
            database.execute(
                "UPDATE agents SET expires_at = ? WHERE agent_id = ?",
                (certificate.not_valid_after_utc.timestamp(), agent_id),
            )
        return tls.pem(certificate)

    def agents(self) -> list[EnrolledAgent]:
        """Return every agent that ever enrolled, by id."""
        return [EnrolledAgent(**row) for row in self._read("SELECT * FROM agents ORDER BY agent_id")]

    def revoked_agents(self) -> set[str]:
        """Return the ids of the agents that may not come in any more."""
        return {row["agent_id"] for row in self._read("SELECT agent_id FROM agents WHERE revoked_at NOTNULL")}

    def revoke_agent(self, agent_id: str) -> None:
        """Revoke an agent, whose calls are refused from now on.

        Only a token that is created after the revocation can enroll the agent again.

        Raises:
            NotFoundError: there is no such agent.
        """
        # A second revocation changes nothing, so tokens that were made since the first still count.
        newest = "(SELECT coalesce(max(rowid), 0) FROM tokens)"
        also = f"last_token = iif(revoked_at IS NULL, {newest}, last_token)"
        self._revoke("agents", "agent_id", agent_id, also)

    def holder(self, certificate: bytes) -> Holder:
        """Return the holder of a certificate, given in PEM.

        Raises:
            UnauthenticatedError: the certificate is neither an agent's nor a token's, or has expired.
            ForbiddenError: the agent has been revoked.
        """
        leaf = _parse(certificate)
        if _is_issued_by(certificate, self.ca_certificate):
            return self._agent_holding(leaf)
        token_id = tls.token_id_of(leaf)
        rows = self._read("SELECT root FROM tokens WHERE token_id = ?", token_id)
        if rows and _is_issued_by(certificate, rows[0]["root"].encode()):
            return Holder(agent_id=None, token_id=token_id)
        raise UnauthenticatedError("the certificate is not of this server: enroll with a join token")

    def _agent_holding(self, leaf: tls.Certificate) -> Holder:
        """Return the agent that holds a certificate of the CA, or raise as `holder` does."""
        agent_id, key = tls.common_name(leaf), leaf.public_key()
        agent = self._agent(agent_id)
        if agent is None or not isinstance(key, tls.PublicKey) or tls.key_digest(key) != agent.key:
            raise UnauthenticatedError(
                "the certificate is not of an agent that is enrolled: enroll with a join token"
            )
        if agent.revoked_at is not None:
            raise ForbiddenError(revocation(agent_id))
        ends, now = leaf.not_valid_after_utc, self._utc_now()
        if ends <= now:
            raise UnauthenticatedError(
                f"the certificate has ended (on {ends:%Y-%m-%d}, and the server's clock says {now:%Y-%m-%d}):"
                " enroll again with a join token"
            )
        return Holder(agent_id, token_id=None)

    def _costs_a_use(self, token: TokenRow, agent_id: str, key: str) -> bool:
        """Return True if this enrolment uses up one use of the token.

        Raises:
            ForbiddenError: the token is used up, or is older than the revocation of the agent.
            ConflictError: another key is enrolled under this agent id, or this key under another agent id.
        """
        before = self._read(
            "SELECT agent_id FROM enrolments WHERE token_id = ? AND key = ?", token.token_id, key
        )
        if before and before[0]["agent_id"] != agent_id:
            raise ConflictError(
                f"this device's key is enrolled as agent {before[0]['agent_id']}: enroll it as that,"
                " or remove its state directory",
                Reason.AGENT_ID_TAKEN,
            )
        if not before and token.num_used >= token.uses:
            raise ForbiddenError(f"the join token is used up: {_ASK_OPERATOR}", Reason.TOKEN)
        agent = self._agent(agent_id)
        if agent and agent.revoked_at is not None:
            if token.number <= agent.last_token:
                raise ForbiddenError(revocation(agent_id))
        elif agent and agent.key != key:
            raise ConflictError(
                f"another device is enrolled as agent {agent_id}: choose another --agent-id, or have that one"
                f" revoked first (`cloud-server agents revoke {agent_id}`), and enroll with a newer token",
                Reason.AGENT_ID_TAKEN,
            )
        return not before

    def _live_token(self, token_id: str, now: float) -> TokenRow:
        """Return the token's record; raise ForbiddenError if the token has expired or was revoked."""
        (token,) = (each for each in self.tokens() if each.token_id == token_id)
        if token.revoked_at is not None or not token.holds(now):
            what = "was revoked" if token.revoked_at is not None else "has expired"
            raise ForbiddenError(f"the join token {what}: {_ASK_OPERATOR}", Reason.TOKEN)
        return token

    def _agent(self, agent_id: str) -> EnrolledAgent | None:
        """Return the record of the agent, or None if the agent has never enrolled."""
        rows = self._read("SELECT * FROM agents WHERE agent_id = ?", agent_id)
        return EnrolledAgent(**rows[0]) if rows else None

    def _revoke(self, table: str, column: str, name: str, also: str = "") -> None:
        """Record the revocation of a token or an agent; a second one leaves the time of the first.

        Args:
            table: the table of the record.
            column: the column with the name.
            name: the token or the agent.
            also: another assignment, in SQL.
        """
        changes = ", ".join(filter(None, ["revoked_at = coalesce(revoked_at, ?)", also]))
        with self._transaction() as database:
            changed = database.execute(
                f"UPDATE {table} SET {changes} WHERE {column} = ?",  # noqa: S608
                (self._clock(), name),
            )
            if not changed.rowcount:
                raise NotFoundError(f"there is no {name!r}: `cloud-server {_COMMANDS[table]} list` shows all")

    def newest_record(self) -> float:
        """Return the latest time at which a token was made or an agent enrolled; 0 if there is none."""
        rows = self._read(
            "SELECT max(at) AS newest FROM"
            " (SELECT created_at AS at FROM tokens UNION ALL SELECT enrolled_at FROM agents)"
        )
        return rows[0]["newest"] or 0.0

    def now(self) -> float:
        """Return the seconds since the epoch, by the clock that decides when tokens expire."""
        return self._clock()

    def _utc_now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        """Lock the folder, so that no two processes make the same missing file at the same moment."""
        with self._writing, (self._folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that is committed at the end; a disk that takes no data is a StorageError."""
        with self._writing, storage_errors(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            yield database

    def _read(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Return committed rows.

        Within `_transaction` the rows cannot change any more, because only one transaction writes at a time.
        """
        with self._reading:
            return self._reader.execute(query, values).fetchall()


def revocation(agent_id: str) -> str:
    """Return the message for a revoked agent."""
    return f"agent {agent_id} has been revoked: ask the server's operator"


def _open_database(path: Path) -> sqlite3.Connection:
    database = connect(path)
    migrate(database, path, _MIGRATIONS)
    return database


@lru_cache(maxsize=4096)
def _parse(certificate: bytes) -> tls.Certificate:
    return tls.load_certificate(certificate)


@lru_cache(maxsize=4096)
def _is_issued_by(certificate: bytes, issuer: bytes) -> bool:
    return tls.is_issued_by(_parse(certificate), _parse(issuer))
