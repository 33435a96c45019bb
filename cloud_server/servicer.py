"""The service of the wire contract, translated: protobuf ↔ domain.

Nothing is decided here; errors become statuses in common/rpc.py.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.desk import Desk
from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.cloud_server.door.admission import calling_agent, token_in_use
from ecavg.cloud_server.door.authority import Authority
from ecavg.common import rpc
from ecavg.common.agent_progress import TOLD, AgentProgress
from ecavg.common.errors import InvalidError, Reason, UnavailableError
from ecavg.common.faults import Point, crash_point
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import Versions
from ecavg.common.run_state import Availability, Outcome, Phase, RunState, Selection, Verdict, Wait
from ecavg.common.tasks import Kind
from ecavg.common.transfer import DIGEST, Blob, Encoded, chunks_of

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ECAvg"].full_name

# A stream that brings nothing for so long is given up; a slow one never is.
IDLE_SECONDS = 120.0

_MAX_SHARDS = 10_000
_MAX_EXAMPLES = 2**40
# The most that the differences of one agent's comparison can have for the sum of their squares, so that the
# sum over all agents is finite.
_MAX_SQUARES = 1e300

_PHASES: dict[Phase, Any] = {phase: pb.Phase.Value(f"PHASE_{phase.name}") for phase in Phase}
_OUTCOMES: dict[Outcome, Any] = {each: pb.Outcome.Value(f"OUTCOME_{each.name}") for each in Outcome}
_SELECTIONS: dict[Selection, Any] = {each: pb.Selection.Value(f"SELECTION_{each.name}") for each in Selection}
_REASONS: dict[Reason, Any] = {reason: pb.Reason.Value(f"REASON_{reason.name}") for reason in Reason}
_ACTIVITIES = {pb.Activity.Value(f"ACTIVITY_{each.name}"): each for each in TOLD}
_WAITS = {pb.Wait.Value(f"WAIT_{each.name}"): each for each in Wait}
_KINDS = {pb.BLOB_KIND_WEIGHTS: "weights", pb.BLOB_KIND_DATA: "data"}


class ECAvgServicer(pb_grpc.ECAvgServicer):
    """The service of proto/common/pb/ecavg.proto."""

    def __init__(self, desk: Desk, authority: Authority | None) -> None:
        self._desk = desk
        self._authority = authority

    def add_to(self, server: Any) -> None:
        """Have a gRPC server answer the service's calls by this object."""
        pb_grpc.add_ECAvgServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Join(self, request: pb.JoinRequest, _: Any) -> pb.JoinReply:
        """Answer Join: who the agent is in this run."""
        oldest, newest = request.protocol_version, request.newest_protocol_version
        spoken = Versions(oldest, max(oldest, newest))
        joined = await self._desk.join(calling_agent(), request.class_names, spoken)
        return pb.JoinReply(
            run_id=joined.run_id,
            # A key that has its default value may be newer than the agent, which would refuse it.
            run_json=joined.run.model_dump_json(exclude_defaults=True),
            slot=joined.slot,
            num_partitions=joined.num_partitions,
            probe=joined.probe,
            planned_rounds=joined.planned_rounds,
            protocol_version=joined.protocol_version,
        )

    async def Watch(self, request: pb.WatchRequest, _: Any) -> AsyncIterator[pb.WatchEvent]:
        """Answer Watch: the state of the run, after each change."""
        said = Availability(not request.not_ready, _WAITS.get(request.waits_for), request.num_new_examples)
        async for state in self._desk.watch(calling_agent(), said):
            yield _event(state)

    async def QueryUpload(self, request: pb.QueryUploadRequest, _: Any) -> pb.QueryUploadReply:
        """Answer QueryUpload: from which byte an upload goes on."""
        received_bytes, complete = await self._desk.query_upload(
            calling_agent(), _kind(request.kind), _digest(request.digest)
        )
        return pb.QueryUploadReply(received_bytes=received_bytes, complete=complete)

    async def Upload(self, request_iterator: Any, _: Any) -> pb.UploadReply:
        """Answer Upload: take in a blob, chunk by chunk."""
        messages = aiter(request_iterator)
        first = await _next(messages)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidError("the first message of an upload must be its header")
        header = first.header
        blob = Blob(_digest(header.digest), header.size_bytes)
        async with self._desk.receive(calling_agent(), _kind(header.kind), blob, header.offset) as upload:
            while (message := await _next(messages)) is not None:
                if message.WhichOneof("part") != "chunk":
                    raise InvalidError("after its header an upload has chunks only")
                await upload.write(message.chunk)
        return pb.UploadReply(received_bytes=blob.size_bytes)

    async def Contribute(self, request: pb.ContributeRequest, _: Any) -> pb.ContributeReply:
        """Answer Contribute: commit uploaded blobs to a round."""
        verdict = await self._desk.contribute(
            calling_agent(), request.round, _contribution(calling_agent(), request, self._desk.kind)
        )
        return _reply(verdict)

    async def Download(self, request: pb.DownloadRequest, _: Any) -> AsyncIterator[pb.DownloadReply]:
        """Answer Download: send a blob, chunk by chunk."""
        async with self._desk.readable_blob(calling_agent(), _digest(request.digest)) as path:
            size_bytes = path.stat().st_size
            with self._desk.sending(calling_agent(), size_bytes, request.offset) as sent:
                async for chunk in chunks_of(path, request.offset):
                    yield pb.DownloadReply(chunk=chunk, size_bytes=size_bytes)
                    crash_point(Point.SERVER_CHUNK_SENT)
                    sent(len(chunk))
                    size_bytes = 0
        # Where nothing is left to send, the size alone says so.
        if size_bytes:
            yield pb.DownloadReply(size_bytes=size_bytes)

    async def Report(self, request: pb.ReportRequest, _: Any) -> pb.ReportReply:
        """Answer Report: keep what became of a model on a device."""
        kind = self._desk.kind
        row = ReportRow(
            agent_id=calling_agent(),
            score_local=_score(request, "score_local", kind),
            score_before=_score(request, "score_before", kind),
            score_after=_score(request, "score_after", kind) or 0.0,
            score_adapted=_score(request, "score_adapted", kind),
            num_held_out=_count(request.num_held_out),
            applied=request.applied,
            reason=rpc.plain(request.reason),
            # The desk's clock says when.
            at=0.0,
            **_differences(request),
        )
        await self._desk.report(calling_agent(), request.round, row)
        return pb.ReportReply()

    async def Progress(self, request: pb.ProgressRequest, _: Any) -> pb.ProgressReply:
        """Answer Progress: show how far the agent is."""
        pause_seconds = self._desk.note_progress(calling_agent(), _agent_progress(request))
        return pb.ProgressReply(pause_seconds=pause_seconds)

    async def Enroll(self, request: pb.EnrollRequest, _: Any) -> pb.EnrollReply:
        """Answer Enroll: certify a new agent's key."""
        authority = self._tls()
        certificate = await asyncio.to_thread(authority.enroll, token_in_use(), request.request)
        return pb.EnrollReply(
            certificate=certificate, ca_certificate=authority.ca_certificate, server_time=time.time()
        )

    async def Renew(self, request: pb.RenewRequest, _: Any) -> pb.RenewReply:
        """Answer Renew: certify a known agent's key again."""
        certificate = await asyncio.to_thread(self._tls().renew, calling_agent(), request.request)
        return pb.RenewReply(certificate=certificate)

    def _tls(self) -> Authority:
        if self._authority is None:
            raise InvalidError("this server speaks plaintext (--insecure): there is nothing to enroll for")
        return self._authority


async def _next(messages: AsyncIterator[pb.UploadRequest]) -> pb.UploadRequest | None:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await anext(messages, None)
    except TimeoutError as error:
        raise UnavailableError(f"nothing arrived for {IDLE_SECONDS:g} seconds; resume the upload") from error


def _digest(text: str) -> str:
    if not DIGEST.fullmatch(text):
        raise InvalidError("a digest must be 64 lower-case hexadecimal digits")
    return text


def _kind(kind: Any) -> str:
    if kind not in _KINDS:
        raise InvalidError("the kind of a blob must be weights or data")
    return _KINDS[kind]


def _score(message: Any, field: str, kind: Kind) -> float | None:
    """Return a figure of the run's task, or None where an optional one is absent."""
    if message.DESCRIPTOR.fields_by_name[field].has_presence and not message.HasField(field):
        return None
    value = float(getattr(message, field))
    if not math.isfinite(value) or not kind.lowest <= value <= kind.highest:
        raise InvalidError(f"{field} must be a number from {kind.lowest:g} to {kind.highest:g}")
    return value


def _differences(request: pb.ReportRequest) -> dict[str, float | None]:
    """Return the sums of a comparison, or None for both where there is none.

    Raises:
        InvalidError: no differences have such sums (the Cauchy-Schwarz inequality).
    """
    if not request.HasField("difference_total"):
        return {"difference_total": None, "difference_squares": None}
    total, squares = request.difference_total, request.difference_squares
    is_sum_of_squares = 0 <= squares <= _MAX_SQUARES
    # Rounding may have moved both sums a little.
    most = math.sqrt(squares) * math.sqrt(request.num_held_out) * (1 + 1e-6) if is_sum_of_squares else 0.0
    if not (is_sum_of_squares and abs(total) <= most):
        raise InvalidError("no differences of that many examples have these two sums")
    return {"difference_total": total, "difference_squares": squares}


def _count(value: int) -> int:
    if value > _MAX_EXAMPLES:
        raise InvalidError(f"{value} examples are more than anyone has")
    return value


def _agent_progress(request: pb.ProgressRequest) -> AgentProgress | None:
    """Return what the agent tells; None: it does nothing that takes long, or nothing that is known here."""
    activity = _ACTIVITIES.get(request.activity)
    if activity is None:
        return None
    loss = request.loss if request.HasField("loss") and math.isfinite(request.loss) else None
    total = _count(request.total) or None
    return AgentProgress(activity, min(_count(request.done), total or _MAX_EXAMPLES), total, loss)


def _contribution(agent_id: str, request: pb.ContributeRequest, kind: Kind) -> Contribution:
    if request.num_examples < 1:
        raise InvalidError("num_examples must be at least 1")
    if len(request.shard_digests) > _MAX_SHARDS:
        raise InvalidError(f"a contribution has at most {_MAX_SHARDS} shards")
    if len(set(request.shard_digests)) < len(request.shard_digests):
        raise InvalidError("a contribution names the same shard twice")
    return Contribution(
        agent_id=agent_id,
        weights_digest=_digest(request.weights_digest),
        shard_digests=tuple(_digest(digest) for digest in request.shard_digests),
        num_examples=_count(request.num_examples),
        initial_digest=_digest(request.initial_weights_digest) if request.initial_weights_digest else None,
        score_local=_score(request, "score_local", kind),
    )


def _blob(blob: Blob) -> pb.Blob:
    return pb.Blob(digest=blob.digest, size_bytes=blob.size_bytes)


def _encoded(encoded: Encoded) -> pb.Encoded:
    return pb.Encoded(blob=_blob(encoded.blob), base_digest=encoded.base)


def _event(state: RunState) -> pb.WatchEvent:
    event = pb.WatchEvent(
        round=state.round,
        phase=_PHASES[state.phase],
        initial_weights=_blob(state.initial_weights),
        failed_round=state.failed_round,
        failure=state.failure,
        run_over=state.run_over,
        num_contributions=state.num_contributions,
        max_contributions=state.max_contributions,
        counted_round=state.counted_round,
        accepted_weights=state.accepted_weights,
        has_full_curve=state.has_full_curve,
        last_round_over=state.last_round_over,
        next_round_at=state.next_round_at or 0.0,
        num_examples_to_open=state.num_examples_to_open or 0,
        is_pinned=state.is_pinned,
        withdrawn_rounds=state.withdrawn_rounds,
        server_time=time.time(),
    )
    if left_out := state.left_out:
        event.left_out.CopyFrom(
            pb.LeftOut(round=left_out.round, reason=_REASONS[left_out.reason], message=left_out.message)
        )
    if state.outcome:
        event.outcome = _OUTCOMES[state.outcome]
    if state.selection:
        event.selection = _SELECTIONS[state.selection]
    if state.progress:
        event.progress.CopyFrom(
            pb.Progress(done=state.progress.done, total=state.progress.total, loss=state.progress.loss)
        )
    if state.initial_encoded:
        event.initial_encoded.CopyFrom(_encoded(state.initial_encoded))
    if state.initial_rest:
        event.initial_rest.CopyFrom(_blob(state.initial_rest))
    if latest := state.latest_model:
        model = pb.PublishedModel(round=latest.round, weights=_blob(latest.weights))
        if latest.encoded:
            model.encoded.CopyFrom(_encoded(latest.encoded))
        if latest.rest:
            model.rest.CopyFrom(_blob(latest.rest))
        event.latest_model.CopyFrom(model)
    return event


def _reply(verdict: Verdict) -> pb.ContributeReply:
    reply = pb.ContributeReply(outcome=_OUTCOMES[verdict.outcome], message=verdict.message)
    if verdict.reason:
        reply.reason = _REASONS[verdict.reason]
    return reply
