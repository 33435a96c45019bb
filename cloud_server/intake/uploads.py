"""Uploads in progress: the streams that bring blobs, resumed, checked and stored."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.disk.tables import UploadRow
from ecavg.cloud_server.disk.together import Together
from ecavg.cloud_server.intake.budgets import Budgets
from ecavg.cloud_server.intake.gates import BlobGate, DataGate, WeightsGate
from ecavg.cloud_server.intake.turns import Turns
from ecavg.cloud_server.store import Store
from ecavg.common import late_targets, schema, wire
from ecavg.common.config import Wire
from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import InvalidError, NotFoundError, OffsetError, Reason, UnavailableError
from ecavg.common.faults import Point, crash_point
from ecavg.common.transfer import Blob, Receiver, WriteBehind, to_the_end

# For these reasons a blob is unfit for this round; any other fault is cured by sending the blob again.
UNFIT = {
    Reason.INVALID_FILE,
    Reason.SCHEMA_MISMATCH,
    Reason.NON_FINITE,
    Reason.INVALID_SHARD,
    Reason.SIZE_LIMIT,
    Reason.AGENT_BUDGET,
    Reason.ROUND_BUDGET,
}

# Unless it is configured, an agent may have so many of the largest blobs of each kind here.
_AGENT_BLOBS = 4
# So many agents can spend all they may before a round's budget is spent.
_LEAST_AGENTS = 8


Commits = Together[UploadRow, None]


class Uploads:
    """All uploads of one run. One stream at a time may write a blob of an agent; the newest wins.

    Args:
        weights_schema: names, shapes and dtypes of weights that are not encoded.
        wires: how weights may be encoded; the first is the run's.
        max_data_bytes: the size of the largest shard.
        num_agents: how many agents a round is meant for.
        agent_bytes, round_bytes: the budgets; None: generous ones, by what a blob may have.
        turns: who may upload now.
        on_received: called from any thread with the kind and the bytes of each chunk that was taken in.
    """

    def __init__(
        self,
        store: Store,
        *,
        weights_schema: schema.Schema,
        wires: Sequence[Wire] = ("float32",),
        spec: DatasetSpec,
        max_data_bytes: int,
        num_agents: int = 1,
        agent_bytes: int | None = None,
        round_bytes: int | None = None,
        turns: Turns,
        on_received: Callable[[str, int], None] = lambda _kind, _num_bytes: None,
    ) -> None:
        self._store = store
        self._spec = spec
        self._on_received = on_received
        self._gates: Mapping[str, BlobGate] = {
            "weights": WeightsGate(weights_schema, wires),
            "data": DataGate(spec, max_data_bytes),
        }
        agent_bytes = agent_bytes or _AGENT_BLOBS * sum(gate.max_bytes for gate in self._gates.values())
        round_bytes = round_bytes or 2 * agent_bytes * max(_LEAST_AGENTS, num_agents)
        self._budgets = Budgets(agent_bytes, round_bytes, partial(unused_sizes, store))
        self._commits = Commits(self._commit)
        self._turns = turns
        self._active: dict[tuple[str, str], Upload] = {}
        self._shut_out: set[str] = set()

    @property
    def active(self) -> list[Path]:
        """Return the files that are being written."""
        return [upload.path for upload in self._active.values() if upload.path]

    def begin_round(self) -> None:
        """Count what agents send from zero on."""
        self._budgets.begin_round()

    def forget_sizes(self) -> None:
        """Drop the cached sizes of files: some were removed."""
        self._budgets.forget_sizes()

    def forget_sizes_of(self, agent_id: str) -> None:
        """Drop the cached sizes of an agent's files: some are used by a round now."""
        self._budgets.forget_sizes_of(agent_id)

    def let_in(self, agent_id: str) -> None:
        """Take what the agent uploads; only an agent that was shut out has to be let in."""
        self._shut_out.discard(agent_id)
        self._budgets.forget_sizes_of(agent_id)

    async def shut_out(self, agent_id: str) -> None:
        """End the agent's streams and take no others; when this returns, nothing more of it is written."""
        self._shut_out.add(agent_id)
        for agent, digest in list(self._active):
            if agent == agent_id:
                await self._supersede(agent, digest)

    async def query(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        """Return how many bytes are durably stored, and whether the blob is complete and checked."""
        # A stream of the same blob may be about to complete it.
        await self._supersede(agent_id, digest)
        return await asyncio.to_thread(self._stored, agent_id, kind, digest)

    def _stored(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        if self._store.has_upload(agent_id, digest, kind):
            return self._store.blobs.size(digest) or 0, True
        return _durable_size(self._store.partial_path(agent_id, digest)), False

    # These three read the disk, and are called in a thread.

    def check_complete(self, contribution: Contribution, *, with_weights: bool = True) -> None:
        """Check that every blob that a contribution names is stored, checked, and uploaded by its agent.

        Args:
            with_weights: False where the agent need not have uploaded the weights.

        Raises:
            NotFoundError: this agent has not uploaded one of them.
        """
        weights = [(contribution.weights_digest, "weights")] if with_weights else []
        for digest, kind in [*weights, *((digest, "data") for digest in contribution.shard_digests)]:
            if not self._store.has_upload(contribution.agent_id, digest, kind):
                raise NotFoundError(f"the {kind} blob {digest[:16]}… is not uploaded", Reason.MISSING_BLOB)

    def count_shared(self, shards: Sequence[str], num_examples: int) -> int:
        """Return how many examples with a target an agent's shards hold.

        That the agent has trained on more, which it does not share, is believed.

        Raises:
            InvalidError: the agent says that it has trained on fewer, or late targets are for no shard.
        """
        files = {digest: self._store.blobs.path(digest) for digest in shards}
        headers = {digest: schema.read_header(path) for digest, path in files.items()}
        num_shared = late_targets.check_contributed(headers, files, self._spec)
        if num_shared > num_examples:
            raise InvalidError(
                f"num_examples is {num_examples}, but the contribution's shards have {num_shared} examples:"
                " send the number of all examples that were trained on"
            )
        return num_shared

    def check_base(self, weights: str, initial_weights: str | None) -> None:
        """Check that the base of the stored weights is the initial weights that the agent claims.

        Raises:
            InvalidError: the base is another one.
        """
        header = schema.read_header(self._store.blobs.path(weights))
        base = wire.encoding_of(header).base
        if base != initial_weights:
            found = f"differences from {base[:16]}…" if base else "no differences"
            start = f"{initial_weights[:16]}…" if initial_weights else "weights of the agent's own"
            raise InvalidError(
                f"the weights are {found}, and pre-training started from {start}: encode what has changed",
                Reason.INITIAL_WEIGHTS,
            )

    @asynccontextmanager
    async def open(
        self, agent_id: str, kind: str, blob: Blob, offset: int, now: float
    ) -> AsyncIterator["Upload"]:
        """Receive a blob from `offset` on, when its turn has come.

        Raises:
            OffsetError: the stored bytes end elsewhere.
            InvalidError: the declared size is over the limit of its kind.
            BudgetError: this agent, or all together, may not send or have so many bytes here.
        """
        gate = self._gates[kind]
        gate.check_size(blob.size_bytes)
        self._budgets.check_sent(agent_id, max(0, blob.size_bytes - offset))
        async with self._turns.turn(agent_id) as end_turn:
            await self._supersede(agent_id, blob.digest)
            if agent_id in self._shut_out:
                raise NotFoundError(f"agent {agent_id} has not joined this run", Reason.UNKNOWN_AGENT)
            upload = Upload(
                self._store, self._budgets, self._commits, agent_id, kind, blob, gate, self._on_received
            )
            upload.end_turn = end_turn
            key = (agent_id, blob.digest)
            self._active[key] = upload
            try:
                await self._budgets.check_files(agent_id, self._declared(agent_id))
                await upload.start(offset)
                yield upload
                await upload.finish(now)
            finally:
                await upload.close()
                if self._active.get(key) is upload:
                    del self._active[key]

    async def _commit(self, uploads: Sequence[UploadRow]) -> list[Exception | None]:
        return await asyncio.to_thread(self._store.commit_uploads, uploads)

    def _declared(self, agent_id: str) -> dict[str, int]:
        """Return, by digest, the sizes that an agent has declared to be sending."""
        streams = self._active.items()
        return {digest: upload.blob.size_bytes for (agent, digest), upload in streams if agent == agent_id}

    async def _supersede(self, agent_id: str, digest: str) -> None:
        """End an older stream of the same blob: its agent has come back on a new connection."""
        key = (agent_id, digest)
        # Again and again: another stream may have come during the wait.
        while older := self._active.get(key):
            older.superseded = True
            # Under its lock, the older stream puts nothing more.
            async with older.lock:
                await older.close()
            # The stream of a connection that is gone may be open for a long time yet.
            older.end_turn()
            if self._active.get(key) is older:
                del self._active[key]


class Upload:
    """One stream that writes one blob."""

    def __init__(
        self,
        store: Store,
        budgets: Budgets,
        commits: Commits,
        agent_id: str,
        kind: str,
        blob: Blob,
        gate: BlobGate,
        on_received: Callable[[str, int], None],
    ) -> None:
        self.lock = asyncio.Lock()
        self.superseded = False
        # Lets the next upload have its turn.
        self.end_turn: Callable[[], None] = lambda: None
        self.blob = blob
        self._store = store
        self._budgets = budgets
        self._commits = commits
        self._agent_id = agent_id
        self._kind = kind
        # The file that is written, once it is known.
        self.path: Path | None = None
        self._gate = gate
        self._on_received = on_received
        self._receiver: Receiver | None = None
        self._behind = WriteBehind(self._write)
        self._closing: asyncio.Task[None] | None = None

    async def start(self, offset: int) -> None:
        """Go on where the stored bytes end.

        Raises:
            OffsetError: that is not at `offset`.
        """
        async with self._exclusively():
            await to_the_end(asyncio.to_thread(self._start, offset))

    async def write(self, chunk: bytes) -> None:
        """Append a chunk; raise what Receiver.write and the gate raise, for this chunk or an earlier one.

        Raises:
            InvalidError: the chunk is empty; a stream of empty chunks would never end.
            BudgetError: the agent, or all of them, have sent too much in this round.
        """
        if not chunk:
            raise InvalidError("a chunk has no bytes: end the stream instead")
        self._budgets.spend(self._agent_id, len(chunk))
        async with self._exclusively():
            await self._behind.put(chunk)

    async def finish(self, now: float) -> None:
        """Check the whole blob, make it durable and record it; raise what Receiver and the gate raise."""
        async with self._exclusively():
            await self._behind.flush()
            await to_the_end(self._finish(now))

    async def close(self) -> None:
        """Keep what has arrived; who calls this again waits for the first call's end."""
        if self._closing is None or self._closing.done():
            self._closing = asyncio.ensure_future(self._close())
        await to_the_end(self._closing)

    async def _close(self) -> None:
        await self._behind.close()
        receiver, self._receiver = self._receiver, None
        if receiver:
            receiver.close()
            kept_bytes = None if receiver.is_discarded else receiver.received_bytes
            self._budgets.note_file(self._agent_id, self.blob.digest, kept_bytes)

    @asynccontextmanager
    async def _exclusively(self) -> AsyncIterator[None]:
        async with self.lock:
            if self.superseded:
                raise UnavailableError("a newer stream of the same upload has taken over")
            yield

    def _start(self, offset: int) -> None:
        with storage_errors():
            self.path = self._store.partial_path(self._agent_id, self.blob.digest)
            receiver = Receiver(self.path, self.blob, self._passes_gate)
        self._receiver = receiver
        if receiver.received_bytes > self.blob.size_bytes:
            receiver.discard()
            raise InvalidError("more bytes are stored than the header declares", Reason.SIZE_MISMATCH)
        if receiver.received_bytes != offset:
            raise OffsetError(f"the upload goes on at {receiver.received_bytes}, not at {offset}")

    async def _finish(self, now: float) -> None:
        await asyncio.to_thread(self._check_whole)
        assert self.path
        async with self._store.blobs.kept(self.path, self.blob.digest):
            await self._commits.do(UploadRow(self._agent_id, self.blob.digest, self._kind, now))

    def _check_whole(self) -> None:
        assert self._receiver
        assert self.path
        with storage_errors():
            self._receiver.finish()
            try:
                # Bytes of an earlier stream may have passed the gate of another kind.
                self._gate.check_header(schema.read_header(self.path))
                self._gate.check_content(self.path)
            except InvalidError:
                self._receiver.discard()
                raise

    def _write(self, chunk: bytes) -> None:
        assert self._receiver
        with storage_errors():
            self._receiver.write(chunk)
        # Counted here, because the stream may be cancelled while this thread writes.
        self._on_received(self._kind, len(chunk))
        crash_point(Point.SERVER_CHUNK_STORED)

    def _passes_gate(self, prefix: bytes | bytearray) -> bool:
        needed = schema.header_bytes_needed(prefix)
        if needed is None or len(prefix) < min(needed, self.blob.size_bytes):
            return False
        size_bytes, max_tensors = self.blob.size_bytes, self._gate.max_tensors
        self._gate.check_header(schema.parse_header(prefix, size_bytes, max_tensors=max_tensors))
        return True


def unused_sizes(store: Store, agent_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """Return the sizes in bytes of agents' uploads that no kept contribution uses, by agent id and digest.

    A kept contribution is one of the agent's, in a round that is not retired. Partial uploads count too. An
    agent that is not in the run is left out.
    """
    slots = {}
    for agent_id in agent_ids:
        with suppress(NotFoundError):
            slots[agent_id] = store.slot(agent_id)
    begun = store.blobs.partial_sizes(slots.values())
    return {agent_id: begun[slot] | _unused_blobs(store, agent_id) for agent_id, slot in slots.items()}


def _unused_blobs(store: Store, agent_id: str) -> dict[str, int]:
    unused = store.read(
        "WITH kept AS (SELECT weights, shards FROM contributions WHERE agent_id = ?1"
        " AND round IN (SELECT number FROM rounds WHERE NOT retired))"
        " SELECT DISTINCT digest FROM uploads WHERE agent_id = ?1 AND digest NOT IN"
        " (SELECT weights FROM kept UNION ALL SELECT value FROM kept, json_each(kept.shards))",
        agent_id,
    )
    return {row["digest"]: store.blobs.size(row["digest"]) or 0 for row in unused}


def _durable_size(path: Path) -> int:
    """Return how many bytes survive a power cut: the file is flushed before its size is promised."""
    with storage_errors():
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return 0
        try:
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
