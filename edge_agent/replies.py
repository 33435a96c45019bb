"""What the server sends, as values: protobuf → domain. What no server of ours sends is an error."""

from enum import Enum
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from ecavg.common import rpc
from ecavg.common.config import RunConfig
from ecavg.common.errors import Reason, RunError, UsageError
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.run_state import (
    LeftOut,
    Outcome,
    Phase,
    PublishedModel,
    RunState,
    Selection,
    WorkProgress,
)
from ecavg.common.transfer import DIGEST, Blob, Encoded

# A time beyond, in seconds since the epoch, is none: datetime ends with the year 9999.
MAX_TIME = 250_000_000_000.0

_E = TypeVar("_E", bound=Enum)


def run_config(run_json: str) -> RunConfig:
    """Return the configuration of the run.

    Raises:
        UsageError: this version does not understand it.
    """
    try:
        return RunConfig.model_validate_json(run_json)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "run"
        raise UsageError(
            f"this agent does not understand the server's run ({rpc.plain(key)}: {rpc.plain(first['msg'])}):"
            " install the same version on both"
        ) from error


def run_state(event: pb.WatchEvent) -> RunState:
    """Return the state of the run; raise RunError if it is none."""
    phase = member(Phase, pb.Phase, event.phase)
    if phase is None:
        strange("a state without a phase")
    return RunState(
        round=event.round,
        phase=phase,
        initial_weights=_blob(event.initial_weights),
        initial_encoded=_encoded(event, "initial_encoded"),
        initial_rest=_rest(event, "initial_rest"),
        outcome=member(Outcome, pb.Outcome, event.outcome),
        accepted_weights=_digest(event.accepted_weights),
        progress=_progress(event.progress) if event.HasField("progress") else None,
        latest_model=_published(event.latest_model) if event.latest_model.round else None,
        failed_round=event.failed_round,
        failure=rpc.plain(event.failure),
        run_over=event.run_over,
        num_contributions=event.num_contributions,
        max_contributions=event.max_contributions,
        counted_round=event.counted_round,
        left_out=_left_out(event.left_out) if event.left_out.round else None,
        selection=member(Selection, pb.Selection, event.selection),
        has_full_curve=event.has_full_curve,
        last_round_over=event.last_round_over,
        next_round_at=event.next_round_at if 0 < event.next_round_at < MAX_TIME else None,
        num_examples_to_open=event.num_examples_to_open or None,
        is_pinned=event.is_pinned,
        withdrawn_rounds=tuple(event.withdrawn_rounds),
    )


def _progress(message: pb.Progress) -> WorkProgress:
    return WorkProgress(message.done, message.total, message.loss if message.HasField("loss") else None)


def _published(message: pb.PublishedModel) -> PublishedModel:
    encoded, rest = _encoded(message, "encoded"), _rest(message, "rest")
    return PublishedModel(message.round, _blob(message.weights), encoded, rest)


def _left_out(message: pb.LeftOut) -> LeftOut:
    reason = member(Reason, pb.Reason, message.reason) or Reason.INTERNAL
    return LeftOut(message.round, reason, rpc.plain(message.message))


def _blob(message: pb.Blob) -> Blob:
    return Blob(_digest(message.digest), message.size_bytes)


def _digest(text: str) -> str:
    """Return the digest, which becomes the name of a file here; "" stands for no digest."""
    if text and not DIGEST.fullmatch(text):
        strange("a digest that is none")
    return text


def _encoded(message: Any, field: str) -> Encoded | None:
    if not message.HasField(field):
        return None
    encoded = getattr(message, field)
    return Encoded(_blob(encoded.blob), _digest(encoded.base_digest) or None)


def _rest(message: Any, field: str) -> Blob | None:
    return _blob(getattr(message, field)) if message.HasField(field) else None


def member(ours: type[_E], theirs: Any, value: int) -> _E | None:
    """Return our enum member of the same name, `PHASE_COLLECTING` → Phase.COLLECTING; None: unspecified."""
    if value not in theirs.values():
        strange(f"{ours.__name__.upper()}_{value}")
    return ours[theirs.Name(value).removeprefix(f"{ours.__name__.upper()}_")] if value else None


def strange(what: str) -> NoReturn:
    """Raise the error of something that no server of ours sends."""
    raise RunError(f"the server sent {what}: install the same version on both, or trust it no more")
