"""The server as the agent sees it: every call is tried again until it is answered, transfers resume."""

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tenacity import RetryCallState

from ecavg.common import rpc, tracing
from ecavg.common.agent_progress import TOLD, Activity, AgentProgress
from ecavg.common.config import RunConfig
from ecavg.common.errors import (
    CorruptError,
    ECAvgError,
    InvalidError,
    OffsetError,
    Reason,
    Refusal,
    UnavailableError,
    UsageError,
)
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import sync
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN
from ecavg.common.run_state import (
    Outcome,
    RunState,
    Verdict,
    Wait,
)
from ecavg.common.tls import TlsMaterial
from ecavg.common.transfer import Blob, Receiver, WriteBehind, chunks_of
from ecavg.edge_agent.hours import UploadHours
from ecavg.edge_agent.identity import Identity, explain
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.rate_limit import RateLimit
from ecavg.edge_agent.replies import member, run_config, run_state, strange
from ecavg.edge_agent.server_clock import ServerClock
from ecavg.edge_agent.state import Report

Kind = Literal["weights", "data"]
# Called with the bytes done and the bytes in all.
OnBytes = Callable[[int, int], None]

# A small call is answered within this time, or tried again.
CALL_SECONDS = 60.0
# A Watch that lasted for so long was a good one: the next pause is a short one again.
STEADY_SECONDS = 10.0
# The server's clock may be set, and devices sleep, so the time of the renewal is looked at so often.
RENEWAL_POLL_SECONDS = 3600.0
# So much time passes between two renewals at least, should a clock be wrong.
MIN_RENEWAL_SECONDS = 60.0
# Where a file does not match its digest so often, the file is damaged, not the network.
MAX_DAMAGED = 3

# Of transfers nothing is told: the server sees them.
_ACTIVITIES: dict[Activity, Any] = {each: pb.Activity.Value(f"ACTIVITY_{each.name}") for each in TOLD}
_WAITS: dict[Wait, Any] = {each: pb.Wait.Value(f"WAIT_{each.name}") for each in Wait}
# Why a server refuses an agent that will be refused again until somebody has changed something.
_NEEDS_A_PERSON = (Reason.CLASS_NAMES, Reason.PROTOCOL_MISMATCH)
_KINDS = {"weights": pb.BLOB_KIND_WEIGHTS, "data": pb.BLOB_KIND_DATA}
_T = TypeVar("_T")

log = structlog.get_logger()


class UnknownAgentError(ECAvgError):
    """The server does not know this agent: it has begun another run, which the agent has to join."""


class _ReplacedError(Exception):
    """The Watch was given up for one with a newer certificate, or that says whether the agent is ready."""


class Joined(NamedTuple):
    """What the server said when this agent joined."""

    run_id: str
    run: RunConfig
    # Slots are numbered from 1 on.
    slot: int
    num_partitions: int
    # Outputs of the server's model, for the probe of common/rehearsal.py.
    probe: tuple[float, ...] = ()
    # How many rounds the learning-rate schedule is for.
    planned_rounds: int = 1


class CloudClient:
    """One agent's connection to the cloud server.

    Every method may raise UnknownAgentError. A call is tried again for `patience_seconds` without a word from
    the server; then it raises the error of the last try.

    Args:
        caller: who calls; a name alone means plaintext.
        on_waiting: called once with the reason when the server is out of reach, and with "" when it is back.
        on_wrong_clock: called once with one line if the clocks of device and server differ.
        upload_limit: the rate limit of all uploads together.
        download_limit: the rate limit of all downloads together.
    """

    patience_seconds = math.inf

    def __init__(
        self,
        server: str,
        caller: Identity | str,
        metrics: AgentMetrics,
        on_waiting: Callable[[str], None] = lambda _: None,
        on_wrong_clock: Callable[[str], None] = lambda _: None,
        *,
        upload_limit: RateLimit | None = None,
        download_limit: RateLimit | None = None,
        upload_hours: UploadHours | None = None,
    ) -> None:
        self._upload_hours = upload_hours or UploadHours()
        self._upload_limit = upload_limit or RateLimit()
        self._download_limit = download_limit or RateLimit()
        self._server = server
        self._identity: Identity | None = caller if isinstance(caller, Identity) else None
        name = {} if isinstance(caller, Identity) else {rpc.AGENT_ID_KEY: caller}
        self._metadata = tuple((name | {rpc.INSTANCE_KEY: secrets.token_hex(8)}).items())
        self._metrics = metrics
        self._on_waiting = on_waiting
        self._server_clock = ServerClock(on_wrong_clock)
        # The trouble that was told last; "": the server is there.
        self._trouble = ""
        self._heard_at = -math.inf
        # The open Watch; None: there is none, or another one is to take its place.
        self._watching: Any = None
        # What this agent says of itself when it opens a Watch.
        self._is_ready = True
        self._waits_for: Wait | None = None
        # True while an upload waits for the hours in which it may begin.
        self.upload_waits = False
        self._num_new_examples = 0
        # How many calls are under way on each connection.
        self._num_calls: Counter[grpc.aio.Channel] = Counter()
        self._connect()

    async def close(self) -> None:
        """End all connections."""
        for channel in {self._channel, *self._num_calls}:
            await channel.close(None)

    async def keep_identity(self) -> None:
        """Renew the certificate whenever it is time, for as long as this runs."""
        while self._identity:
            seconds = self._identity.renews_at.timestamp() - await self._server_clock.now()
            if seconds > 0:
                await asyncio.sleep(min(seconds, RENEWAL_POLL_SECONDS))
                continue
            try:
                reply = await self._unary("Renew", pb.RenewRequest(request=self._identity.request()))
                await asyncio.to_thread(self._identity.renew, reply.certificate)
                self._reconnect()
                log.info("certificate_renewed", ends=self._identity.ends_at.isoformat())
            except (ECAvgError, OSError) as error:
                # There is time enough to try again.
                log.warning("certificate_not_renewed", reason=str(error))
            await asyncio.sleep(MIN_RENEWAL_SECONDS)

    async def join(self, class_names: Sequence[str] = ()) -> Joined:
        """Join the server's run; an agent may join again.

        Args:
            class_names: the classes that this agent's labels stand for; empty where nobody knows.

        Raises:
            UsageError: the classes are not those of the run, or no version of the protocol is common.
        """
        request = pb.JoinRequest(
            protocol_version=SPOKEN.oldest, newest_protocol_version=SPOKEN.newest, class_names=class_names
        )
        try:
            reply = await self._unary("Join", request)
        except InvalidError as error:
            if error.reason not in _NEEDS_A_PERSON:
                raise
            raise UsageError(str(error)) from error
        if not (reply.slot and reply.num_partitions):
            strange("a slot or a number of partitions that is 0")
        # A server that names no version is older than the agreement on one, and took the oldest.
        if not SPOKEN.oldest <= (reply.protocol_version or SPOKEN.oldest) <= SPOKEN.newest:
            strange("a protocol version that was not offered")
        run, probe = run_config(reply.run_json), tuple(reply.probe)
        planned_rounds = max(1, reply.planned_rounds)
        return Joined(reply.run_id, run, reply.slot, reply.num_partitions, probe, planned_rounds)

    def say_ready(self, is_ready: bool, waits_for: Wait | None = None) -> None:
        """Tell the server whether this agent may be drawn for a round; it may as long as nothing is said.

        Args:
            waits_for: why it may not; None: that is not said.
        """
        self._is_ready, self._waits_for = is_ready, waits_for
        self._watch_anew()

    def say_new_examples(self, number: int) -> None:
        """Tell the server how many examples this agent has that it has not contributed with."""
        if number != self._num_new_examples:
            self._num_new_examples = number
            self._watch_anew()

    def _note_upload_waits(self, does_wait: bool) -> None:
        self.upload_waits = does_wait
        self._watch_anew()

    async def watch(self) -> AsyncIterator[RunState]:
        """Yield the state of the run whenever it changes, across reconnections, until the run is over.

        Raises:
            UsageError: another device has the same identity.
        """
        backoff, is_over = rpc.Backoff(), False
        while not is_over:
            opened_at = time.monotonic()
            try:
                async with aclosing(self._watch_once()) as events:
                    async for event in events:
                        self._heard()
                        self._server_clock.heard(event.server_time)
                        is_over = event.run_over
                        yield run_state(event)
                # Once the run is over, this end is waited for: it tells the server that the agent has heard.
                if not is_over:
                    raise UnavailableError("the server ended the stream")
            except _ReplacedError:
                continue
            except Refusal as error:
                if is_over:
                    return
                if error.reason is Reason.IDENTITY_IN_USE:
                    raise UsageError(str(error)) from error
                if not rpc.is_retried(error):
                    raise
                if time.monotonic() - opened_at > STEADY_SECONDS:
                    backoff.reset()
                pause_seconds = backoff()
                await self._before_retry(error, pause_seconds)
                await asyncio.sleep(pause_seconds)

    async def upload(self, path: Path, blob: Blob, kind: Kind, on_bytes: OnBytes) -> None:
        """Store the file on the server, from where an earlier attempt ended.

        Raises:
            InvalidError: the server refuses the file for good, or `blob` is not this file's.
        """
        with tracing.span(f"upload {kind}"):
            await self._upload(path, blob, kind, on_bytes)

    async def _upload(self, path: Path, blob: Blob, kind: Kind, on_bytes: OnBytes) -> None:
        query = pb.QueryUploadRequest(digest=blob.digest, kind=_KINDS[kind])
        fate = _Fate()
        async for attempt in self._retrying(fate.backoff):
            with attempt:
                stored = await self._once("QueryUpload", query)
                fate.reached(stored.received_bytes)
                on_bytes(stored.received_bytes, blob.size_bytes)
                if stored.complete:
                    return
                await self._upload_hours.wait(self._note_upload_waits)
                with fate.bounded(CorruptError, Refusal):
                    await self._stream_up(path, blob, kind, stored.received_bytes, on_bytes)

    async def contribute(
        self,
        number: int,
        *,
        weights: Blob,
        shards: list[Blob],
        num_examples: int,
        score_local: float | None,
        initial_weights: str | None,
    ) -> Verdict:
        """Commit uploaded blobs to round `number`.

        Args:
            initial_weights: digest of what pre-training started from; None: the agent's own.
        """
        request = pb.ContributeRequest(
            round=number,
            weights_digest=weights.digest,
            shard_digests=[shard.digest for shard in shards],
            num_examples=num_examples,
            score_local=score_local,
            initial_weights_digest=initial_weights,
        )
        with tracing.span("contribute"):
            reply = await self._unary("Contribute", request)
        outcome = member(Outcome, pb.Outcome, reply.outcome)
        if outcome is None:
            strange("an answer without an outcome")
        return Verdict(outcome, member(Reason, pb.Reason, reply.reason), rpc.plain(reply.message))

    async def download(self, blob: Blob, path: Path, on_bytes: OnBytes) -> None:
        """Fetch a blob to `path`, where it appears whole, checked and durable.

        Raises:
            InvalidError: the server's file is damaged.
            NotFoundError: the server does not have it.
            OSError: this device's disk does not take it.
        """
        partial = path.with_name(f".{path.name}.{blob.digest[:16]}.partial")
        fate = _Fate("the server's file is damaged, `cloud-server check` there says more: ")
        async for attempt in self._retrying(fate.backoff):
            with attempt, fate.bounded(CorruptError, OffsetError):
                await self._stream_down(partial, blob, on_bytes, fate)
        await asyncio.to_thread(partial.replace, path)
        await asyncio.to_thread(sync, path.parent)

    async def report(self, report: Report) -> None:
        """Report what became of a global model on this device."""
        # The server knows the initial weights from the contribution.
        fields = report.model_dump(exclude={"initial_weights"})
        with tracing.span("report"):
            await self._unary("Report", pb.ReportRequest(**fields))

    async def tell_progress(self, progress: AgentProgress | None) -> float:
        """Tell how far this agent is, in one attempt; return for how many seconds no more need be told.

        Args:
            progress: None: the agent does nothing now that takes long.

        Raises:
            Refusal: the server says no, or cannot be reached.
        """
        request = pb.ProgressRequest()
        if progress:
            request = pb.ProgressRequest(
                activity=_ACTIVITIES[progress.activity],
                done=progress.done,
                total=progress.total,
                loss=progress.loss,
            )
        reply = await self._once("Progress", request)
        return float(reply.pause_seconds)

    # ------------------------------------------------------------------ how calls are made

    def _call_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return who calls, and where a round is traced, the span that the call is made in."""
        current = tracing.current()
        return (*self._metadata, (tracing.TRACEPARENT, current)) if current else self._metadata

    def _connect(self) -> None:
        self._channel = rpc.channel(self._server, self._identity.material if self._identity else None)
        self._stub = pb_grpc.ECAvgStub(self._channel)  # type: ignore[no-untyped-call]

    def _reconnect(self) -> None:
        """Open a new connection: transfers end on the old one, and Watch begins anew."""
        self._connect()
        self._watch_anew()

    def _watch_anew(self) -> None:
        """Have a new Watch take the place of the open one."""
        if self._watching:
            self._watching.cancel()
            self._watching = None

    @asynccontextmanager
    async def _line(self) -> AsyncIterator[Any]:
        """Yield the stub to make a call with; its connection stays until the call is over."""
        channel, stub = self._channel, self._stub
        self._num_calls[channel] += 1
        try:
            yield stub
        finally:
            self._num_calls[channel] -= 1
            if not self._num_calls[channel] and channel is not self._channel:
                del self._num_calls[channel]
                await channel.close(None)

    async def _unary(self, method: str, request: Any) -> Any:
        async for attempt in self._retrying():
            with attempt:
                return await self._once(method, request)
        raise AssertionError("retrying ends with an answer or an error")

    async def _once(self, method: str, request: Any) -> Any:
        async with self._line() as stub:
            call = getattr(stub, method)
            reply = await _translated(call(request, metadata=self._call_metadata(), timeout=CALL_SECONDS))
        self._heard()
        return reply

    async def _watch_once(self) -> AsyncGenerator[pb.WatchEvent, None]:
        """Yield the events of one Watch; raise _ReplacedError when another is to take its place."""
        async with self._line() as stub:
            waits_for = self._waits_for or (Wait.UPLOAD_HOURS if self.upload_waits else None)
            request = pb.WatchRequest(
                not_ready=not self._is_ready,
                waits_for=_WAITS[waits_for] if waits_for else pb.WAIT_UNSPECIFIED,
                num_new_examples=self._num_new_examples,
            )
            call = self._watching = stub.Watch(request, metadata=self._call_metadata())
            try:
                async for event in _answered(call):
                    yield event
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._watching is call or (task and task.cancelling()):
                    raise
                raise _ReplacedError from None
            finally:
                call.cancel()

    async def _stream_up(self, path: Path, blob: Blob, kind: Kind, offset: int, on_bytes: OnBytes) -> None:
        header = pb.UploadHeader(
            digest=blob.digest, kind=_KINDS[kind], size_bytes=blob.size_bytes, offset=offset
        )
        async with self._line() as stub:
            await self._send(stub.Upload(metadata=self._call_metadata()), header, path, kind, on_bytes)

    async def _send(
        self, call: Any, header: pb.UploadHeader, path: Path, kind: Kind, on_bytes: OnBytes
    ) -> None:
        sent = header.offset
        try:
            # Not as an iterator: where reading the file fails, gRPC would cancel this task and not say why.
            await _translated(call.write(pb.UploadRequest(header=header)))
            async for chunk in chunks_of(path, sent):
                await _translated(call.write(pb.UploadRequest(chunk=chunk)))
                sent += len(chunk)
                await self._upload_limit.let_through(len(chunk))
                self._metrics.sent_bytes_total.labels(kind).inc(len(chunk))
                crash_point(Point.AGENT_CHUNK_SENT)
                on_bytes(sent, header.size_bytes)
            await _translated(call.done_writing())
        except asyncio.InvalidStateError:
            # The server has ended the call; its status says why.
            pass
        except BaseException:
            call.cancel()
            raise
        await _translated(call)

    async def _stream_down(self, partial: Path, blob: Blob, on_bytes: OnBytes, fate: "_Fate") -> None:
        receiver = await asyncio.to_thread(Receiver, partial, blob)
        behind = WriteBehind(receiver.write)
        try:
            if (received := receiver.received_bytes) < blob.size_bytes:
                request = pb.DownloadRequest(digest=blob.digest, offset=received)
                async with self._line() as stub:
                    async for reply in _answered(stub.Download(request, metadata=self._call_metadata())):
                        self._heard()
                        if not reply.chunk and not reply.size_bytes:
                            strange("chunks without a byte")
                        await behind.put(reply.chunk)
                        received += len(reply.chunk)
                        self._metrics.received_bytes_total.labels("model").inc(len(reply.chunk))
                        await self._download_limit.let_through(len(reply.chunk))
                        fate.reached(received)
                        crash_point(Point.AGENT_CHUNK_RECEIVED)
                        on_bytes(received, blob.size_bytes)
                await behind.flush()
            await asyncio.to_thread(receiver.finish)
        finally:
            await behind.close()
            receiver.close()

    def _retrying(self, backoff: rpc.Backoff | None = None) -> Any:
        return rpc.retrying(self._before_retry, backoff, self._is_given_up)

    def _is_given_up(self, attempts: RetryCallState) -> bool:
        since = max(self._heard_at, attempts.start_time)
        return time.monotonic() - since > self.patience_seconds

    async def _before_retry(self, error: BaseException, pause_seconds: float) -> None:
        log.debug("retry", error=str(error), pause_seconds=round(pause_seconds, 3))
        trouble = await asyncio.to_thread(explain, self._server, self._identity, str(error))
        if not self._trouble:
            self._metrics.reconnects_total.inc()
        # One line for a server that is away, however that shows; another one for what it turns out to be.
        if not self._trouble or trouble not in (str(error), self._trouble):
            self._trouble = trouble
            self._on_waiting(trouble)

    def _heard(self) -> None:
        self._heard_at = time.monotonic()
        if self._trouble:
            self._trouble = ""
            self._on_waiting("")


class _Fate:
    """The rule by which a transfer is tried again: soon while it gets on, and not for ever while it fails.

    Args:
        verdict: begins the message after MAX_DAMAGED failures.
    """

    def __init__(self, verdict: str = "") -> None:
        self.backoff = rpc.Backoff()
        self._verdict = verdict
        self._furthest = 0
        self._num_damaged = 0

    def reached(self, num_bytes: int) -> None:
        """Note how far the transfer is."""
        if num_bytes > self._furthest:
            self._furthest = num_bytes
            self.backoff.reset()

    @contextmanager
    def bounded(self, *kinds: type[Refusal]) -> Iterator[None]:
        """Turn the last error of exactly these kinds into one that is not tried again."""
        try:
            yield
        except Refusal as error:
            if type(error) in kinds:
                self._num_damaged += 1
                if self._num_damaged >= MAX_DAMAGED:
                    raise InvalidError(f"{self._verdict}{error}", error.reason) from error
            raise


class Certified(NamedTuple):
    """What a server sends to a device that it has enrolled: two certificates in PEM, and its time."""

    certificate: bytes
    ca_certificate: bytes
    server_time: float


async def ask_for_certificate(server: str, material: TlsMaterial, request: bytes) -> Certified:
    """Enroll, in one attempt.

    Args:
        material: the key and certificate of a join token.
        request: the request for a certificate, PKCS#10 in DER.

    Raises:
        Refusal: the server says no; UnavailableError: it cannot be reached, or ends the handshake.
    """
    channel = rpc.channel(server, material)
    try:
        stub = pb_grpc.ECAvgStub(channel)  # type: ignore[no-untyped-call]
        reply = await _translated(stub.Enroll(pb.EnrollRequest(request=request), timeout=CALL_SECONDS))
    finally:
        await channel.close(None)
    return Certified(reply.certificate, reply.ca_certificate, reply.server_time)


async def ask_for_health(server: str, material: TlsMaterial) -> None:
    """Make a call that changes nothing, and that the server answers to enrolled agents only.

    Raises:
        Refusal: the server says no; UnavailableError: it cannot be reached, or ends the handshake.
    """
    channel = rpc.channel(server, material)
    try:
        check = health_pb2_grpc.HealthStub(channel).Check
        await _translated(check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS))
    finally:
        await channel.close(None)


async def _translated(call: Awaitable[_T]) -> _T:
    """Return the answer; raise the server's refusal as the error that the server has raised."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _error_from(error) from error


async def _answered(call: Any) -> AsyncIterator[Any]:
    """Yield the messages of a stream; raise a refusal as its error. Keepalive finds a dead peer."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise _error_from(error) from error


def _error_from(error: grpc.aio.AioRpcError) -> ECAvgError:
    refusal = rpc.error_from(error)
    return UnknownAgentError(str(refusal)) if refusal.reason is Reason.UNKNOWN_AGENT else refusal
