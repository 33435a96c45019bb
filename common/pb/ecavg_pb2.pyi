from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_MALFORMED_REQUEST: _ClassVar[Reason]
    REASON_PROTOCOL_MISMATCH: _ClassVar[Reason]
    REASON_UNKNOWN_AGENT: _ClassVar[Reason]
    REASON_UNKNOWN_BLOB: _ClassVar[Reason]
    REASON_SIZE_LIMIT: _ClassVar[Reason]
    REASON_SIZE_MISMATCH: _ClassVar[Reason]
    REASON_OFFSET_MISMATCH: _ClassVar[Reason]
    REASON_DIGEST_MISMATCH: _ClassVar[Reason]
    REASON_INVALID_FILE: _ClassVar[Reason]
    REASON_SCHEMA_MISMATCH: _ClassVar[Reason]
    REASON_NON_FINITE: _ClassVar[Reason]
    REASON_INVALID_SHARD: _ClassVar[Reason]
    REASON_MISSING_BLOB: _ClassVar[Reason]
    REASON_ROUND_CLOSED: _ClassVar[Reason]
    REASON_ALREADY_CONTRIBUTED: _ClassVar[Reason]
    REASON_STORAGE_FULL: _ClassVar[Reason]
    REASON_UNAVAILABLE: _ClassVar[Reason]
    REASON_INTERNAL: _ClassVar[Reason]
    REASON_INITIAL_WEIGHTS: _ClassVar[Reason]
    REASON_NOT_ENROLLED: _ClassVar[Reason]
    REASON_REVOKED: _ClassVar[Reason]
    REASON_TOKEN: _ClassVar[Reason]
    REASON_AGENT_ID_TAKEN: _ClassVar[Reason]
    REASON_AGENT_BUDGET: _ClassVar[Reason]
    REASON_ROUND_BUDGET: _ClassVar[Reason]
    REASON_RUN_FULL: _ClassVar[Reason]
    REASON_CALL_RATE: _ClassVar[Reason]
    REASON_OPEN_CALLS: _ClassVar[Reason]
    REASON_LARGE_UPDATE: _ClassVar[Reason]
    REASON_QUARANTINED: _ClassVar[Reason]
    REASON_CLASS_NAMES: _ClassVar[Reason]
    REASON_IDENTITY_IN_USE: _ClassVar[Reason]
    REASON_NOT_DRAWN: _ClassVar[Reason]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_COLLECTING: _ClassVar[Phase]
    PHASE_AGGREGATING: _ClassVar[Phase]
    PHASE_FINE_TUNING: _ClassVar[Phase]
    PHASE_EVALUATING: _ClassVar[Phase]
    PHASE_PUBLISHED: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]

class BlobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOB_KIND_UNSPECIFIED: _ClassVar[BlobKind]
    BLOB_KIND_WEIGHTS: _ClassVar[BlobKind]
    BLOB_KIND_DATA: _ClassVar[BlobKind]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_ACCEPTED: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
    OUTCOME_LATE: _ClassVar[Outcome]

class Selection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECTION_UNSPECIFIED: _ClassVar[Selection]
    SELECTION_PENDING: _ClassVar[Selection]
    SELECTION_DRAWN: _ClassVar[Selection]
    SELECTION_NOT_DRAWN: _ClassVar[Selection]

class Activity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVITY_UNSPECIFIED: _ClassVar[Activity]
    ACTIVITY_READING: _ClassVar[Activity]
    ACTIVITY_PRE_TRAINING: _ClassVar[Activity]
    ACTIVITY_EVALUATING: _ClassVar[Activity]
    ACTIVITY_ADAPTING: _ClassVar[Activity]

class Wait(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_UNSPECIFIED: _ClassVar[Wait]
    WAIT_HOURS: _ClassVar[Wait]
    WAIT_COMMAND: _ClassVar[Wait]
    WAIT_TIME: _ClassVar[Wait]
    WAIT_EXAMPLES: _ClassVar[Wait]
    WAIT_UPLOAD_HOURS: _ClassVar[Wait]
REASON_UNSPECIFIED: Reason
REASON_MALFORMED_REQUEST: Reason
REASON_PROTOCOL_MISMATCH: Reason
REASON_UNKNOWN_AGENT: Reason
REASON_UNKNOWN_BLOB: Reason
REASON_SIZE_LIMIT: Reason
REASON_SIZE_MISMATCH: Reason
REASON_OFFSET_MISMATCH: Reason
REASON_DIGEST_MISMATCH: Reason
REASON_INVALID_FILE: Reason
REASON_SCHEMA_MISMATCH: Reason
REASON_NON_FINITE: Reason
REASON_INVALID_SHARD: Reason
REASON_MISSING_BLOB: Reason
REASON_ROUND_CLOSED: Reason
REASON_ALREADY_CONTRIBUTED: Reason
REASON_STORAGE_FULL: Reason
REASON_UNAVAILABLE: Reason
REASON_INTERNAL: Reason
REASON_INITIAL_WEIGHTS: Reason
REASON_NOT_ENROLLED: Reason
REASON_REVOKED: Reason
REASON_TOKEN: Reason
REASON_AGENT_ID_TAKEN: Reason
REASON_AGENT_BUDGET: Reason
REASON_ROUND_BUDGET: Reason
REASON_RUN_FULL: Reason
REASON_CALL_RATE: Reason
REASON_OPEN_CALLS: Reason
REASON_LARGE_UPDATE: Reason
REASON_QUARANTINED: Reason
REASON_CLASS_NAMES: Reason
REASON_IDENTITY_IN_USE: Reason
REASON_NOT_DRAWN: Reason
PHASE_UNSPECIFIED: Phase
PHASE_COLLECTING: Phase
PHASE_AGGREGATING: Phase
PHASE_FINE_TUNING: Phase
PHASE_EVALUATING: Phase
PHASE_PUBLISHED: Phase
PHASE_FAILED: Phase
BLOB_KIND_UNSPECIFIED: BlobKind
BLOB_KIND_WEIGHTS: BlobKind
BLOB_KIND_DATA: BlobKind
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_ACCEPTED: Outcome
OUTCOME_REJECTED: Outcome
OUTCOME_LATE: Outcome
SELECTION_UNSPECIFIED: Selection
SELECTION_PENDING: Selection
SELECTION_DRAWN: Selection
SELECTION_NOT_DRAWN: Selection
ACTIVITY_UNSPECIFIED: Activity
ACTIVITY_READING: Activity
ACTIVITY_PRE_TRAINING: Activity
ACTIVITY_EVALUATING: Activity
ACTIVITY_ADAPTING: Activity
WAIT_UNSPECIFIED: Wait
WAIT_HOURS: Wait
WAIT_COMMAND: Wait
WAIT_TIME: Wait
WAIT_EXAMPLES: Wait
WAIT_UPLOAD_HOURS: Wait

class Blob(_message.Message):
    __slots__ = ("digest", "size_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Encoded(_message.Message):
    __slots__ = ("blob", "base_digest")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    blob: Blob
    base_digest: str
    def __init__(self, blob: _Optional[_Union[Blob, _Mapping]] = ..., base_digest: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol_version", "class_names", "newest_protocol_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    class_names: _containers.RepeatedScalarFieldContainer[str]
    newest_protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ..., class_names: _Optional[_Iterable[str]] = ..., newest_protocol_version: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("run_id", "run_json", "slot", "num_partitions", "probe", "planned_rounds", "protocol_version")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_JSON_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PLANNED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_json: str
    slot: int
    num_partitions: int
    probe: _containers.RepeatedScalarFieldContainer[float]
    planned_rounds: int
    protocol_version: int
    def __init__(self, run_id: _Optional[str] = ..., run_json: _Optional[str] = ..., slot: _Optional[int] = ..., num_partitions: _Optional[int] = ..., probe: _Optional[_Iterable[float]] = ..., planned_rounds: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("not_ready", "waits_for", "num_new_examples")
    NOT_READY_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    not_ready: bool
    waits_for: Wait
    num_new_examples: int
    def __init__(self, not_ready: bool = ..., waits_for: _Optional[_Union[Wait, str]] = ..., num_new_examples: _Optional[int] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("round", "phase", "initial_weights", "outcome", "progress", "latest_model", "failed_round", "failure", "run_over", "num_contributions", "max_contributions", "initial_encoded", "counted_round", "accepted_weights", "left_out", "server_time", "selection", "has_full_curve", "last_round_over", "next_round_at", "num_examples_to_open", "initial_rest", "is_pinned", "withdrawn_rounds")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LATEST_MODEL_FIELD_NUMBER: _ClassVar[int]
    FAILED_ROUND_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RUN_OVER_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_ENCODED_FIELD_NUMBER: _ClassVar[int]
    COUNTED_ROUND_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    HAS_FULL_CURVE_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_OVER_FIELD_NUMBER: _ClassVar[int]
    NEXT_ROUND_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_TO_OPEN_FIELD_NUMBER: _ClassVar[int]
    INITIAL_REST_FIELD_NUMBER: _ClassVar[int]
    IS_PINNED_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    phase: Phase
    initial_weights: Blob
    outcome: Outcome
    progress: Progress
    latest_model: PublishedModel
    failed_round: int
    failure: str
    run_over: bool
    num_contributions: int
    max_contributions: int
    initial_encoded: Encoded
    counted_round: int
    accepted_weights: str
    left_out: LeftOut
    server_time: float
    selection: Selection
    has_full_curve: bool
    last_round_over: bool
    next_round_at: float
    num_examples_to_open: int
    initial_rest: Blob
    is_pinned: bool
    withdrawn_rounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., initial_weights: _Optional[_Union[Blob, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., latest_model: _Optional[_Union[PublishedModel, _Mapping]] = ..., failed_round: _Optional[int] = ..., failure: _Optional[str] = ..., run_over: bool = ..., num_contributions: _Optional[int] = ..., max_contributions: _Optional[int] = ..., initial_encoded: _Optional[_Union[Encoded, _Mapping]] = ..., counted_round: _Optional[int] = ..., accepted_weights: _Optional[str] = ..., left_out: _Optional[_Union[LeftOut, _Mapping]] = ..., server_time: _Optional[float] = ..., selection: _Optional[_Union[Selection, str]] = ..., has_full_curve: bool = ..., last_round_over: bool = ..., next_round_at: _Optional[float] = ..., num_examples_to_open: _Optional[int] = ..., initial_rest: _Optional[_Union[Blob, _Mapping]] = ..., is_pinned: bool = ..., withdrawn_rounds: _Optional[_Iterable[int]] = ...) -> None: ...

class LeftOut(_message.Message):
    __slots__ = ("round", "reason", "message")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    round: int
    reason: Reason
    message: str
    def __init__(self, round: _Optional[int] = ..., reason: _Optional[_Union[Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done", "total", "loss")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    loss: float
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class PublishedModel(_message.Message):
    __slots__ = ("round", "weights", "encoded", "rest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    round: int
    weights: Blob
    encoded: Encoded
    rest: Blob
    def __init__(self, round: _Optional[int] = ..., weights: _Optional[_Union[Blob, _Mapping]] = ..., encoded: _Optional[_Union[Encoded, _Mapping]] = ..., rest: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class QueryUploadRequest(_message.Message):
    __slots__ = ("digest", "kind")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    digest: str
    kind: BlobKind
    def __init__(self, digest: _Optional[str] = ..., kind: _Optional[_Union[BlobKind, str]] = ...) -> None: ...

class QueryUploadReply(_message.Message):
    __slots__ = ("received_bytes", "complete")
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    complete: bool
    def __init__(self, received_bytes: _Optional[int] = ..., complete: bool = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("digest", "kind", "size_bytes", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    kind: BlobKind
    size_bytes: int
    offset: int
    def __init__(self, digest: _Optional[str] = ..., kind: _Optional[_Union[BlobKind, str]] = ..., size_bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("received_bytes",)
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    def __init__(self, received_bytes: _Optional[int] = ...) -> None: ...

class ContributeRequest(_message.Message):
    __slots__ = ("round", "weights_digest", "shard_digests", "num_examples", "score_local", "initial_weights_digest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SCORE_LOCAL_FIELD_NUMBER: _ClassVar[int]
    INITIAL_WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    weights_digest: str
    shard_digests: _containers.RepeatedScalarFieldContainer[str]
    num_examples: int
    score_local: float
    initial_weights_digest: str
    def __init__(self, round: _Optional[int] = ..., weights_digest: _Optional[str] = ..., shard_digests: _Optional[_Iterable[str]] = ..., num_examples: _Optional[int] = ..., score_local: _Optional[float] = ..., initial_weights_digest: _Optional[str] = ...) -> None: ...

class ContributeReply(_message.Message):
    __slots__ = ("outcome", "reason", "message")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: Reason
    message: str
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[_Union[Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadReply(_message.Message):
    __slots__ = ("chunk", "size_bytes")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    size_bytes: int
    def __init__(self, chunk: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("round", "score_local", "score_before", "score_after", "num_held_out", "applied", "reason", "score_adapted", "difference_total", "difference_squares")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SCORE_LOCAL_FIELD_NUMBER: _ClassVar[int]
    SCORE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_AFTER_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SCORE_ADAPTED_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_SQUARES_FIELD_NUMBER: _ClassVar[int]
    round: int
    score_local: float
    score_before: float
    score_after: float
    num_held_out: int
    applied: bool
    reason: str
    score_adapted: float
    difference_total: float
    difference_squares: float
    def __init__(self, round: _Optional[int] = ..., score_local: _Optional[float] = ..., score_before: _Optional[float] = ..., score_after: _Optional[float] = ..., num_held_out: _Optional[int] = ..., applied: bool = ..., reason: _Optional[str] = ..., score_adapted: _Optional[float] = ..., difference_total: _Optional[float] = ..., difference_squares: _Optional[float] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProgressRequest(_message.Message):
    __slots__ = ("activity", "done", "total", "loss")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    done: int
    total: int
    loss: float
    def __init__(self, activity: _Optional[_Union[Activity, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class ProgressReply(_message.Message):
    __slots__ = ("pause_seconds",)
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    pause_seconds: float
    def __init__(self, pause_seconds: _Optional[float] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("certificate", "ca_certificate", "server_time")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CA_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    ca_certificate: bytes
    server_time: float
    def __init__(self, certificate: _Optional[bytes] = ..., ca_certificate: _Optional[bytes] = ..., server_time: _Optional[float] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...
