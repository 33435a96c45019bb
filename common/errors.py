"""Every error of the project, and the reasons a server gives when it says no.

    ECAvgError
    ├── UsageError           bad command line, configuration, data source or model: exit code 2
    ├── RunError             failed while running: exit code 1
    │   └── DivergedError    a training's loss is not finite any more
    └── Refusal              what a server answers an agent; carries a Reason, crosses the wire
        ├── InvalidError     what was sent is wrong and would be wrong again: do not retry
        ├── ConflictError    it contradicts what the server already holds
        ├── NotFoundError    the server does not have what was asked for
        ├── OffsetError      the upload does not go on where the server's bytes end: query, resume
        ├── CorruptError     the bytes do not match their digest: send them again
        ├── UnauthenticatedError  the caller's certificate is none of this server's: enroll
        ├── ForbiddenError   the caller may not do this: revoked, or no more than the holder of a token
        ├── StorageError     the server cannot store now (disk full, read-only): wait, retry
        ├── BudgetError      it is more than this agent, or all, may send or be: do not retry in this round
        ├── BusyError        the caller calls too often, or has too many calls open: wait, retry
        └── UnavailableError the server is starting, stopping or out of reach: retry

Messages are for the person at the terminal: one line, what is wrong and what to do about it.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a server refused; the same names, upper-cased, as `enum Reason` in ecavg.proto."""

    MALFORMED_REQUEST = "malformed_request"  # a field is missing, or outside its documented range
    PROTOCOL_MISMATCH = "protocol_mismatch"  # agent and server speak different protocol versions
    UNKNOWN_AGENT = "unknown_agent"  # the agent has not joined
    UNKNOWN_BLOB = "unknown_blob"  # no such blob, or not one that agents may read
    SIZE_LIMIT = "size_limit"  # more bytes than this kind of blob may have
    SIZE_MISMATCH = "size_mismatch"  # more or fewer bytes than the header declared
    OFFSET_MISMATCH = "offset_mismatch"  # the offset is not where the server's bytes end
    DIGEST_MISMATCH = "digest_mismatch"  # the bytes do not hash to the declared digest
    INVALID_FILE = "invalid_file"  # not a safetensors file, or its header is over the cap
    SCHEMA_MISMATCH = "schema_mismatch"  # tensor names, shapes or dtypes are not the run's
    NON_FINITE = "non_finite"  # NaN or infinity in the weights
    INVALID_SHARD = "invalid_shard"  # images or labels do not fit the run's dataset
    MISSING_BLOB = "missing_blob"  # a contribution names a blob that is not uploaded
    ROUND_CLOSED = "round_closed"  # the round no longer takes contributions
    ALREADY_CONTRIBUTED = "already_contributed"  # a different contribution of this agent stands
    STORAGE_FULL = "storage_full"  # the server's disk is full or not writable
    UNAVAILABLE = "unavailable"  # starting, stopping or unreachable
    INITIAL_WEIGHTS = "initial_weights"  # pre-training started from other weights than the round
    NOT_ENROLLED = "not_enrolled"  # the certificate is of no agent of this server, or has ended
    REVOKED = "revoked"  # the agent has been revoked
    TOKEN = "token"  # noqa: S105  the join token is used up, has expired or was revoked
    AGENT_ID_TAKEN = "agent_id_taken"  # another key is enrolled under this agent id
    AGENT_BUDGET = "agent_budget"  # more bytes than the server takes from one agent
    ROUND_BUDGET = "round_budget"  # more bytes than the server takes from all agents in one round
    RUN_FULL = "run_full"  # as many agents as the run takes have joined
    CALL_RATE = "call_rate"  # more calls in a short time than one caller may make
    OPEN_CALLS = "open_calls"  # more calls at once than one caller may have open
    LARGE_UPDATE = "large_update"  # the update goes much further than those of the others in the round
    QUARANTINED = "quarantined"  # the audit holds something against the contribution
    INTERNAL = "internal"  # a fault of the server; its log says more


def one_line(text: str) -> str:
    """A stranger's text as one line, without what would command a terminal or turn its direction."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


class ECAvgError(Exception):
    """Root of the tree; `str(error)` is one line for the user."""

    exit_code = 1


class UsageError(ECAvgError):
    """The user's command line, configuration, data source or model is wrong."""

    exit_code = 2


class RunError(ECAvgError):
    """Something failed while running; the message says what."""


class DivergedError(RunError):
    """A training's loss is not finite any more."""


class Refusal(ECAvgError):
    """What a server answers an agent instead of doing what it asked."""

    default_reason = Reason.INTERNAL

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class InvalidError(Refusal):
    """What was sent is wrong and would be wrong again."""

    default_reason = Reason.MALFORMED_REQUEST


class ConflictError(Refusal):
    """The request contradicts what the server already holds."""

    default_reason = Reason.ALREADY_CONTRIBUTED


class NotFoundError(Refusal):
    """The server does not have what was asked for."""

    default_reason = Reason.UNKNOWN_BLOB


class OffsetError(Refusal):
    """The upload does not go on where the server's bytes end."""

    default_reason = Reason.OFFSET_MISMATCH


class CorruptError(Refusal):
    """The bytes do not match their digest."""

    default_reason = Reason.DIGEST_MISMATCH


class UnauthenticatedError(Refusal):
    """The caller's certificate is of no agent of this server."""

    default_reason = Reason.NOT_ENROLLED


class ForbiddenError(Refusal):
    """The caller is known, and may not do this."""

    default_reason = Reason.REVOKED


class StorageError(Refusal):
    """The server cannot store anything now."""

    default_reason = Reason.STORAGE_FULL


class BudgetError(Refusal):
    """It is more than the server takes from an agent, from all of them in a round, or into a run."""

    default_reason = Reason.AGENT_BUDGET


class BusyError(Refusal):
    """The caller asks for more at a time than the server does for one."""

    default_reason = Reason.CALL_RATE


class UnavailableError(Refusal):
    """The server is starting, stopping or out of reach."""

    default_reason = Reason.UNAVAILABLE
