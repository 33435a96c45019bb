"""The errors of the project, and the reasons that a server gives for a refusal.

    ECAvgError
    ├── UsageError           bad command line, configuration, data source or model: exit code 2
    ├── RunError             a failure while running: exit code 1
    │   └── DivergedError    the loss of a training is no longer finite
    └── Refusal              a server's negative answer to an agent; has a Reason, crosses the wire
        ├── InvalidError     the request is wrong and would be wrong again: do not retry
        ├── ConflictError    the request contradicts what the server already holds
        ├── NotFoundError    the server does not have the thing that was asked for
        ├── OffsetError      the upload does not start where the server's bytes end: query, resume
        ├── CorruptError     the bytes do not match their digest: send the bytes again
        ├── UnauthenticatedError  the caller's certificate is unknown to this server: enroll
        ├── ForbiddenError   the caller is known, but may not make this call: revoked, or holds a token only
        ├── StorageError     the server cannot store now (disk full, read-only): wait, retry
        ├── BudgetError      the limit of an agent, a round or the run is reached: do not retry in this round
        ├── BusyError        the caller calls too often, or has too many open calls: wait, retry
        └── UnavailableError the server is starting, stopping or out of reach: retry

Each message is one line for the person at the terminal. The line says what is wrong and what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Reason(StrEnum):
    """The reasons for a refusal.

    The names are those of `enum Reason` in ecavg.proto, where each has the prefix REASON_.
    """

    # A field is missing, or is outside its documented range.
    MALFORMED_REQUEST = "malformed_request"
    # The agent and the server have no protocol version in common.
    PROTOCOL_MISMATCH = "protocol_mismatch"
    # The agent has not joined.
    UNKNOWN_AGENT = "unknown_agent"
    # The blob does not exist, or agents may not read it.
    UNKNOWN_BLOB = "unknown_blob"
    # The blob has more bytes than a blob of its kind may have.
    SIZE_LIMIT = "size_limit"
    # More or fewer bytes arrived than the header declared.
    SIZE_MISMATCH = "size_mismatch"
    # The offset of the upload is not where the server's bytes end.
    OFFSET_MISMATCH = "offset_mismatch"
    # The digest of the bytes is not the declared digest.
    DIGEST_MISMATCH = "digest_mismatch"
    # The file is not a safetensors file, or its header is over the cap.
    INVALID_FILE = "invalid_file"
    # Names, shapes or dtypes of the tensors are not those of the run's model.
    SCHEMA_MISMATCH = "schema_mismatch"
    # The weights contain NaN or infinity.
    NON_FINITE = "non_finite"
    # The images or the labels do not fit the run's dataset.
    INVALID_SHARD = "invalid_shard"
    # The contribution names a blob that has not been uploaded.
    MISSING_BLOB = "missing_blob"
    # The round no longer takes contributions.
    ROUND_CLOSED = "round_closed"
    # The server has already accepted a different contribution of this agent.
    ALREADY_CONTRIBUTED = "already_contributed"
    # The server's disk is full or not writable.
    STORAGE_FULL = "storage_full"
    # The server is starting, stopping or unreachable.
    UNAVAILABLE = "unavailable"
    # The agent did not start its pre-training from the initial weights of the round.
    INITIAL_WEIGHTS = "initial_weights"
    # The certificate belongs to no agent of this server, or has expired.
    NOT_ENROLLED = "not_enrolled"
    # The agent has been revoked.
    REVOKED = "revoked"
    # The join token is used up, has expired or was revoked.
    TOKEN = "token"  # noqa: S105
    # Another key is enrolled under this agent id.
    AGENT_ID_TAKEN = "agent_id_taken"
    # The agent would send more bytes than the server takes from one agent.
    AGENT_BUDGET = "agent_budget"
    # The agents together would send more bytes than the server takes in one round.
    ROUND_BUDGET = "round_budget"
    # The largest number of agents that the run takes has joined.
    RUN_FULL = "run_full"
    # The caller made more calls in a short time than one caller may make.
    CALL_RATE = "call_rate"
    # The caller has as many open calls as one caller may have.
    OPEN_CALLS = "open_calls"
    # The update is much larger than the updates of the other agents in the round.
    LARGE_UPDATE = "large_update"
    # The audit has found a fault in the contribution.
    QUARANTINED = "quarantined"
    # The classes of the agent's image folder are not the classes of the run.
    CLASS_NAMES = "class_names"
    # Another device, which runs at the same time, has the same identity.
    IDENTITY_IN_USE = "identity_in_use"
    # The agent is not in the sample of agents that take part in the round.
    NOT_DRAWN = "not_drawn"
    # The server failed inside; its log says more.
    INTERNAL = "internal"


# Python has these characters for the bytes of a file name that are not UTF-8 (PEP 383).
_ODD_BYTES = {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}


def encodable(text: str) -> str:
    r"""Return the text so that it can be written in UTF-8.

    File names may hold bytes that are not UTF-8. Each such byte becomes `\xNN`.
    """
    if text.isascii():
        return text
    return text.translate(_ODD_BYTES).encode("utf-8", "replace").decode()


def one_line(text: str) -> str:
    r"""Return a stranger's text, or a path, as one line that is safe to print.

    A space replaces each character that could start a new line, control a terminal, or reverse the
    direction of the text. A byte of a file name that is not UTF-8 becomes `\xNN`.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in encodable(text))


def second_device(agent_id: str) -> str:
    """Return the message about two devices with one identity, which both ends show."""
    return (
        f"another device uses the identity {agent_id}: was its state directory copied? enroll this one under"
        " an id of its own"
    )


class ECAvgError(Exception):
    """The root of the error tree; `str(error)` is one line for the user."""

    exit_code = 1


class UsageError(ECAvgError):
    """An error in the user's command line, configuration, data source or model."""

    exit_code = 2


class RunError(ECAvgError):
    """A failure while running; the message says what has failed."""


class DivergedError(RunError):
    """An error for a training whose loss is no longer finite."""


class Refusal(ECAvgError):
    """A server's answer to a request that the server does not carry out."""

    default_reason = Reason.INTERNAL

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class InvalidError(Refusal):
    """A refusal of a request that is wrong and would be wrong again."""

    default_reason = Reason.MALFORMED_REQUEST


class ConflictError(Refusal):
    """A refusal of a request that contradicts what the server already holds."""

    default_reason = Reason.ALREADY_CONTRIBUTED


class NotFoundError(Refusal):
    """A refusal because the server does not have the thing that was asked for."""

    default_reason = Reason.UNKNOWN_BLOB


class OffsetError(Refusal):
    """A refusal of an upload that does not start where the server's bytes end."""

    default_reason = Reason.OFFSET_MISMATCH


class CorruptError(Refusal):
    """A refusal of bytes that do not match their digest."""

    default_reason = Reason.DIGEST_MISMATCH


class UnauthenticatedError(Refusal):
    """A refusal of a caller whose certificate belongs to no agent of this server."""

    default_reason = Reason.NOT_ENROLLED


class ForbiddenError(Refusal):
    """A refusal of a call that a known caller may not make."""

    default_reason = Reason.REVOKED


class StorageError(Refusal):
    """A refusal because the server cannot store anything now."""

    default_reason = Reason.STORAGE_FULL


class BudgetError(Refusal):
    """A refusal because a limit of the agent, of the round or of the run is reached."""

    default_reason = Reason.AGENT_BUDGET


class BusyError(Refusal):
    """A refusal of a caller that calls too often or has too many open calls."""

    default_reason = Reason.CALL_RATE


class UnavailableError(Refusal):
    """An error for a server that is starting, stopping or out of reach."""

    default_reason = Reason.UNAVAILABLE


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the memory of the machine or of its GPU was not enough.

    PyTorch and the libraries below it raise a RuntimeError, and each of them has words of its own.
    """
    words = ("out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED")
    is_said = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return is_said or isinstance(error, MemoryError)


@contextmanager
def as_value_error() -> Iterator[None]:
    """Raise a UsageError as ValueError, which pydantic tells like all that is wrong with a key."""
    try:
        yield
    except UsageError as error:
        raise ValueError(str(error)) from error
