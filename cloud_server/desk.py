"""What agents ask for: every call of the service, in the words of the run."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import structlog

from ecavg.cloud_server.contribution import Contribution, Decision, Rejection
from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.cloud_server.intake.uploads import UNFIT, Upload, Uploads
from ecavg.cloud_server.ledger import Group, Ledger
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.run import Run
from ecavg.cloud_server.showing.progress import ProgressBoard
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.store import Store
from ecavg.common.agent_progress import AgentProgress
from ecavg.common.config import RunConfig
from ecavg.common.errors import BudgetError, ConflictError, InvalidError, NotFoundError, Reason
from ecavg.common.faults import Point, crash_point
from ecavg.common.protocol import SPOKEN, Versions, agree
from ecavg.common.run_state import AVAILABLE, Availability, Outcome, Phase, RunState, Verdict
from ecavg.common.tasks import Kind, kind_of
from ecavg.common.transfer import Blob
from ecavg.common.wire import needs_base

log = structlog.get_logger()


@dataclass(frozen=True)
class Membership:
    """What an agent learns when it joins."""

    run_id: str
    run: RunConfig
    slot: int
    num_partitions: int
    probe: tuple[float, ...]
    planned_rounds: int
    # The highest version of the protocol that the agent and this server speak.
    protocol_version: int


class Receiving(NamedTuple):
    """An upload that is taken in."""

    upload: Upload
    # Called with the number of bytes of each chunk.
    moved: Callable[[int], None]

    async def write(self, chunk: bytes) -> None:
        """Append a chunk; raise what Upload.write raises."""
        await self.upload.write(chunk)
        self.moved(len(chunk))


class Desk:
    """The desk where agents are answered; whatever an answer promises is on disk before it is given.

    Every method but `join` raises NotFoundError for an agent that has not joined.

    Args:
        clock: seconds since the epoch.
        num_agents: how many parts a shared dataset is dealt out in where the run does not say.
    """

    def __init__(
        self,
        run: Run,
        ledger: Ledger,
        uploads: Uploads,
        *,
        store: Store,
        reports: Reports,
        standing: Standing,
        board: ProgressBoard,
        metrics: ServerMetrics,
        clock: Callable[[], float],
        num_agents: int,
    ) -> None:
        self._run = run
        self._num_agents = num_agents
        self._ledger = ledger
        self._uploads = uploads
        self._store = store
        self._reports = reports
        self._standing = standing
        self._board = board
        self._metrics = metrics
        self._clock = clock

    @property
    def kind(self) -> Kind:
        """Return what is known of the run's task."""
        return kind_of(self._run.config.task)

    async def join(
        self, agent_id: str, class_names: Sequence[str] = (), spoken: Versions = SPOKEN
    ) -> Membership:
        """Return the agent's membership, the same whenever it asks.

        Args:
            class_names: the classes of the agent's image folder; empty where it has none.
            spoken: the versions of the protocol that the agent speaks.

        Raises:
            BudgetError: the run takes no more agents.
            NotFoundError: the agent has just been forgotten.
            InvalidError: the classes are not those of the run, or no version of the protocol is common.
        """
        protocol_version = _agreed_version(agent_id, spoken)
        slot = await self._ledger.join(agent_id, class_names, self._uploads.let_in)
        run = self._run.config.model_copy(update={"class_names": self._ledger.class_names})
        num_partitions = run.num_partitions or self._num_agents
        return Membership(
            self._run.run_id,
            run,
            slot,
            num_partitions,
            self._run.probe,
            self._run.planned_rounds,
            protocol_version,
        )

    def watch(self, agent_id: str, said: Availability = AVAILABLE) -> AsyncIterator[RunState]:
        """Yield the state now, then after each change; slow readers skip states, never the latest.

        Args:
            said: what the agent says of itself.
        """
        self._ledger.check_joined(agent_id)
        return self._standing.watch(agent_id, said)

    def note_progress(self, agent_id: str, progress: AgentProgress | None) -> float:
        """Show how far an agent is; return for how many seconds it need not tell more.

        What is told by an agent that does not watch is dropped: nobody would notice when it has gone.

        Args:
            progress: None: the agent does nothing now that takes long.
        """
        self._ledger.check_joined(agent_id)
        return self._board.tell(agent_id, progress if self._standing.is_watched_by(agent_id) else None)

    # ------------------------------------------------------------------ blobs

    async def query_upload(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        """Return how many bytes of a blob are stored, and whether it is complete and checked."""
        self._ledger.check_joined(agent_id)
        return await self._uploads.query(agent_id, kind, digest)

    @asynccontextmanager
    async def receive(self, agent_id: str, kind: str, blob: Blob, offset: int) -> AsyncIterator["Receiving"]:
        """Take in a blob; one that is unfit, or too much, counts as this agent's rejected contribution."""
        self._ledger.check_joined(agent_id)
        try:
            async with self._uploads.open(agent_id, kind, blob, offset, self._clock()) as upload:
                with self._board.transfer(agent_id, kind, blob.size_bytes, offset) as moved:
                    yield Receiving(upload, moved)
        except (InvalidError, BudgetError) as error:
            if error.reason in UNFIT:
                await self._ledger.reject(agent_id, error.reason, str(error))
            raise

    @asynccontextmanager
    async def readable_blob(self, agent_id: str, digest: str) -> AsyncIterator[Path]:
        """Return a context with the file that an agent's download is read from.

        Raises:
            NotFoundError: the digest is neither initial weights nor a published model.
        """
        self._ledger.check_joined(agent_id)
        if not await asyncio.to_thread(self._store.is_public, digest):
            raise NotFoundError(f"no initial weights or published model has the digest {digest[:16]}…")
        async with self._store.blobs.in_use([digest]):
            yield self._store.blobs.path(digest)

    @contextmanager
    def sending(self, agent_id: str, size_bytes: int, offset: int) -> Iterator[Callable[[int], None]]:
        """Show a download until the context ends; it yields what to call with the bytes that were sent."""
        with self._board.transfer(agent_id, "model", size_bytes, offset) as moved:

            def sent(num_bytes: int) -> None:
                self._metrics.count_sent("model", num_bytes)
                moved(num_bytes)

            yield sent

    # ------------------------------------------------------------------ contributions

    async def contribute(self, agent_id: str, number: int, contribution: Contribution) -> Verdict:
        """Commit uploaded blobs to round `number`; durable when this returns.

        Raises:
            ConflictError: another contribution of this agent stands.
            NotFoundError: a blob it names has not been uploaded by this agent.
            InvalidError: the round does not exist yet; or it starts from other initial weights, and then
                this is a rejected contribution.
        """
        self._ledger.check_joined(agent_id)
        try:
            # The headers of its blobs are read.
            async with self._store.blobs.in_use(contribution.blob_digests):
                outcome = await self._ledger.record(lambda group: self._commit(group, number, contribution))
        except InvalidError as error:
            if error.reason is Reason.INITIAL_WEIGHTS:
                await self._ledger.reject(agent_id, error.reason, str(error))
            raise
        except ConflictError as error:
            log.warning("other_contribution_stands", round=number, agent_id=agent_id, advice=str(error))
            raise
        if outcome is not Outcome.LATE:
            return Verdict(outcome)
        text = f"round {number} had closed; this agent takes part in the next one"
        return Verdict(outcome, Reason.ROUND_CLOSED, text)

    def _commit(self, group: Group, number: int, contribution: Contribution) -> Outcome:
        # The agent may have been forgotten while this call waited for the ledger.
        self._ledger.check_joined(contribution.agent_id)
        current = group.round
        if not self._run.config.first_round <= number <= current.number:
            raise InvalidError(f"round {number} is not open; round {current.number} is")
        if number < current.number:
            return self._commit_late(group, number, contribution)
        # After the round has closed the blobs may be gone, and the answer does not depend on them.
        if current.phase is Phase.COLLECTING:
            contribution = self._checked(contribution, is_warm_up=current.is_warm_up)
        updated, outcome = current.contribute(contribution)
        if updated is not current:
            counted = updated.contributions.get(contribution.agent_id, contribution)
            self._ledger.count(group, number, _decision(counted, outcome, self._clock()), updated)
            self._note_counted(group, number, contribution.agent_id, outcome)
        return outcome

    def _commit_late(self, group: Group, number: int, contribution: Contribution) -> Outcome:
        """Return ACCEPTED if that is what the contribution was in its round, else record it as late."""
        known = self._store.contribution(number, contribution.agent_id)
        if known and known.contribution:
            is_this_one = known.contribution.weights_digest == contribution.weights_digest
            return Outcome.ACCEPTED if is_this_one else Outcome.LATE
        if known is None:
            self._ledger.count(group, number, _decision(contribution, Outcome.LATE, self._clock()))
            self._note_counted(group, number, contribution.agent_id, Outcome.LATE)
        return Outcome.LATE

    def _note_counted(self, group: Group, number: int, agent_id: str, outcome: Outcome) -> None:
        group.afterwards.append(lambda: self._uploads.forget_sizes_of(agent_id))
        if outcome is Outcome.LATE:
            # The report of a round that is over names those who were late.
            group.afterwards.append(lambda: self._reports.note_change(number))

    def _checked(self, contribution: Contribution, *, is_warm_up: bool) -> Contribution:
        """Return the contribution with the number of its shards' examples, once its blobs are checked.

        The ledger is locked meanwhile: no clean-up comes between these checks and the record.

        Args:
            is_warm_up: True where the weights are the server's own, which no agent uploads.
        """
        self._uploads.check_complete(contribution, with_weights=not is_warm_up)
        if needs_base(self._run.config) and not is_warm_up:
            self._uploads.check_base(contribution.weights_digest, contribution.initial_digest)
        num_shared = self._uploads.count_shared(contribution.shard_digests, contribution.num_examples)
        return replace(contribution, num_shared=num_shared)

    # ------------------------------------------------------------------ reports

    async def report(self, agent_id: str, number: int, row: ReportRow) -> None:
        """Keep what became of a published model on a device; durable when this returns.

        Raises:
            NotFoundError: that round has published nothing.
        """
        self._ledger.check_joined(agent_id)

        def record(group: Group) -> None:
            # The agent may have been forgotten while this call waited for the ledger.
            self._ledger.check_joined(agent_id)
            round_row = self._store.round(number)
            if round_row is None or round_row.published_digest is None:
                raise NotFoundError(f"round {number} has published no model", Reason.MALFORMED_REQUEST)
            is_first = self._store.record_report(number, replace(row, at=self._clock()))
            group.afterwards.append(lambda: self._tell_of_report(number, row, is_first))

        await self._ledger.record(record)

    def _tell_of_report(self, number: int, row: ReportRow, is_first: bool) -> None:
        crash_point(Point.SERVER_AGENT_REPORT_RECORDED)
        if is_first:
            self._metrics.count_report(row.applied)
        log.info("agent_reported", round=number, agent_id=row.agent_id, applied=row.applied)
        self._reports.note_change(number)
        self._standing.show_report(row.agent_id, number, is_applied=row.applied)


def _agreed_version(agent_id: str, spoken: Versions) -> int:
    """Return the version of the protocol that the agent and this server agree on.

    Raises:
        InvalidError: there is none.
    """
    try:
        return agree(spoken, SPOKEN)
    except InvalidError as error:
        log.warning("agent_refused", agent_id=agent_id, reason=error.reason.value, message=str(error))
        raise


def _decision(contribution: Contribution, outcome: Outcome, now: float) -> Decision:
    """Return the decision on a contribution that was not refused."""
    agent_id = contribution.agent_id
    if outcome is Outcome.ACCEPTED:
        return Decision(agent_id, outcome, now, contribution)
    # Nobody has looked whether the blobs that a late contribution names are here, so nothing of it is kept.
    return Decision(agent_id, outcome, now, why=Rejection(Reason.ROUND_CLOSED, ""))
