"""Uploads in progress: what a blob must pass, byte by byte, before it is stored."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from cloud_server.contribution import Contribution
from cloud_server.disk.failures import storage_errors
from cloud_server.intake.budgets import Budgets
from cloud_server.store import Store
from common import schema, wire
from common.config import DatasetSpec, Wire
from common.errors import InvalidError, NotFoundError, OffsetError, Reason, UnavailableError
from common.faults import Point, crash_point
from common.transfer import Blob, Receiver, WriteBehind, to_the_end

# What makes a blob unfit for this round; anything else about an upload can be cured by sending it again.
UNFIT = {
    Reason.INVALID_FILE,
    Reason.SCHEMA_MISMATCH,
    Reason.NON_FINITE,
    Reason.INVALID_SHARD,
    Reason.SIZE_LIMIT,
    Reason.AGENT_BUDGET,
    Reason.ROUND_BUDGET,
}

_AGENT_BLOBS = 4  # of the largest of each kind: what an agent may have here, unless that is configured
_LEAST_AGENTS = 8  # so many can spend all they may before a round's budget is spent


class Uploads:
    """All uploads of one run. One stream at a time may write a blob of an agent; the newest wins.

    Args:
        weights_schema: of weights that are not encoded.
        wires: how weights may be encoded; the first is the run's.
        num_agents: whom a round is meant for.
        agent_bytes, round_bytes: the budgets; None: generous ones, by what a blob may have.
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
        on_received: Callable[[str, int], None] = lambda _kind, _num_bytes: None,
    ) -> None:
        self._store = store
        self._on_received = on_received
        self._gates: Mapping[str, BlobGate] = {
            "weights": WeightsGate(weights_schema, wires),
            "data": DataGate(spec, max_data_bytes),
        }
        agent_bytes = agent_bytes or _AGENT_BLOBS * sum(gate.max_bytes for gate in self._gates.values())
        round_bytes = round_bytes or 2 * agent_bytes * max(_LEAST_AGENTS, num_agents)
        self.budgets = Budgets(agent_bytes, round_bytes, store.unused_sizes)
        self._active: dict[tuple[str, str], Upload] = {}
        self._shut_out: set[str] = set()

    @property
    def active(self) -> list[Path]:
        """The files that are being written."""
        return [upload.path for upload in self._active.values()]

    def let_in(self, agent_id: str) -> None:
        """Take what the agent uploads, as is done with every agent that was not shut out."""
        self._shut_out.discard(agent_id)
        self.budgets.look_again_at(agent_id)

    async def shut_out(self, agent_id: str) -> None:
        """End the agent's streams, and take no other: when this returns nothing more of it is written."""
        self._shut_out.add(agent_id)
        for agent, digest in list(self._active):
            if agent == agent_id:
                await self._supersede(agent, digest)

    async def query(self, agent_id: str, kind: str, digest: str) -> tuple[int, bool]:
        """Bytes durably stored, and whether the blob is complete and checked."""
        await self._supersede(agent_id, digest)  # it may be about to complete
        if await asyncio.to_thread(self._store.has_upload, agent_id, digest, kind):
            return self._store.blobs.size(digest) or 0, True
        path = await asyncio.to_thread(self._store.partial_path, agent_id, digest)
        return await asyncio.to_thread(_durable_size, path), False

    async def check_complete(self, contribution: Contribution) -> None:
        """Check that every blob that a contribution names is stored, checked, and uploaded by its agent.

        Raises:
            NotFoundError: this agent has not uploaded one of them.
        """
        shards = [(digest, "data") for digest in contribution.shard_digests]
        for digest, kind in [(contribution.weights_digest, "weights"), *shards]:
            if not await asyncio.to_thread(self._store.has_upload, contribution.agent_id, digest, kind):
                raise NotFoundError(f"the {kind} blob {digest[:16]}… is not uploaded", Reason.MISSING_BLOB)

    async def count_shared(self, shards: Sequence[str], num_examples: int) -> int:
        """The examples in an agent's shards. That it trained on more, which it does not share, is believed.

        Raises:
            InvalidError: it says that it trained on fewer.
        """
        num_shared = await asyncio.to_thread(self._num_labels, shards)
        if num_shared > num_examples:
            raise InvalidError(
                f"num_examples is {num_examples}, but the contribution's shards have {num_shared} labels:"
                " send the number of all examples that were trained on"
            )
        return num_shared

    async def check_base(self, weights: str, initial_weights: str | None) -> None:
        """Hold what stored weights are the difference from against what their agent says it started from.

        Raises:
            InvalidError: the two differ.
        """
        header = await asyncio.to_thread(schema.read_header, self._store.blobs.path(weights))
        base = wire.encoding_of(header).base
        if base != initial_weights:
            found = f"differences from {base[:16]}…" if base else "no differences"
            start = f"{initial_weights[:16]}…" if initial_weights else "weights of the agent's own"
            raise InvalidError(
                f"the weights are {found}, and pre-training started from {start}: encode what has changed",
                Reason.INITIAL_WEIGHTS,
            )

    def _num_labels(self, shards: Sequence[str]) -> int:
        headers = (schema.read_header(self._store.blobs.path(digest)) for digest in shards)
        return sum(header.schema["labels"].shape[0] for header in headers)

    @asynccontextmanager
    async def open(
        self, agent_id: str, kind: str, blob: Blob, offset: int, now: float
    ) -> AsyncIterator["Upload"]:
        """Receive a blob from `offset` on.

        Raises:
            OffsetError: the stored bytes end elsewhere.
            InvalidError: the declared size is over the limit of its kind.
            BudgetError: it is over what this agent, or all of them, may send or have here.
        """
        gate = self._gates[kind]
        gate.check_size(blob.size_bytes)
        self.budgets.check_sent(agent_id, max(0, blob.size_bytes - offset))
        path = await asyncio.to_thread(self._store.partial_path, agent_id, blob.digest)
        await self._supersede(agent_id, blob.digest)
        if agent_id in self._shut_out:
            raise NotFoundError(f"agent {agent_id} has not joined this run", Reason.UNKNOWN_AGENT)
        upload = Upload(self._store, self.budgets, agent_id, kind, blob, path, gate, self._on_received)
        key = (agent_id, blob.digest)
        self._active[key] = upload
        try:
            await self.budgets.check_files(agent_id, self._declared(agent_id))
            await upload.start(offset)
            yield upload
            await upload.finish(now)
        finally:
            await upload.close()
            if self._active.get(key) is upload:
                del self._active[key]

    def _declared(self, agent_id: str) -> dict[str, int]:
        """Bytes by digest of what an agent is sending."""
        streams = self._active.items()
        return {digest: upload.blob.size_bytes for (agent, digest), upload in streams if agent == agent_id}

    async def _supersede(self, agent_id: str, digest: str) -> None:
        """End an older stream of the same blob: its agent has come back on a new connection."""
        key = (agent_id, digest)
        while older := self._active.get(key):  # again: another one may have come while we waited
            older.superseded = True
            async with older.lock:  # it puts nothing more
                await older.close()
            if self._active.get(key) is older:
                del self._active[key]


class Upload:
    """One stream that writes one blob."""

    def __init__(
        self,
        store: Store,
        budgets: Budgets,
        agent_id: str,
        kind: str,
        blob: Blob,
        path: Path,
        gate: "BlobGate",
        on_received: Callable[[str, int], None],
    ) -> None:
        self.lock = asyncio.Lock()
        self.superseded = False
        self.blob = blob
        self._store = store
        self._budgets = budgets
        self._agent_id = agent_id
        self._kind = kind
        self.path = path
        self._gate = gate
        self._on_received = on_received
        self._receiver: Receiver | None = None
        self._behind = WriteBehind(self._write)

    async def start(self, offset: int) -> None:
        """Go on where the stored bytes end.

        Raises:
            OffsetError: that is not at `offset`.
        """
        async with self._exclusively():
            await to_the_end(asyncio.to_thread(self._start, offset))

    async def write(self, chunk: bytes) -> None:
        """Append a chunk; raises what Receiver.write and the gate raise, of this or of an earlier one.

        Raises:
            InvalidError: the chunk is empty: a stream of such would never end.
            BudgetError: the agent, or all of them, have sent too much in this round.
        """
        if not chunk:
            raise InvalidError("a chunk has no bytes: end the stream instead")
        self._budgets.spend(self._agent_id, len(chunk))
        async with self._exclusively():
            await self._behind.put(chunk)

    async def finish(self, now: float) -> None:
        """Check the whole, make it durable and record it; raises what Receiver.finish and the gate raise."""
        async with self._exclusively():
            await self._behind.flush()
            await to_the_end(asyncio.to_thread(self._finish, now))

    async def close(self) -> None:
        """Keep what has arrived."""
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
            receiver = Receiver(self.path, self.blob, self._passes_gate)
        self._receiver = receiver
        if receiver.received_bytes > self.blob.size_bytes:
            receiver.discard()
            raise InvalidError("more bytes are stored than the header declares", Reason.SIZE_MISMATCH)
        if receiver.received_bytes != offset:
            raise OffsetError(f"the upload goes on at {receiver.received_bytes}, not at {offset}")

    def _finish(self, now: float) -> None:
        assert self._receiver
        with storage_errors():
            self._receiver.finish()
            try:
                # Bytes of an earlier stream may have passed the gate of another kind.
                self._gate.check_header(schema.read_header(self.path))
                self._gate.check_content(self.path)
            except InvalidError:
                self._receiver.discard()
                raise
            self._store.commit_upload(self._agent_id, self.blob.digest, self._kind, now)

    def _write(self, chunk: bytes) -> None:
        assert self._receiver
        with storage_errors():
            self._receiver.write(chunk)
        self._on_received(self._kind, len(chunk))  # here: the stream may be cancelled behind our back
        crash_point(Point.SERVER_CHUNK_STORED)

    def _passes_gate(self, prefix: bytes | bytearray) -> bool:
        needed = schema.header_bytes_needed(prefix)
        if needed is None or len(prefix) < min(needed, self.blob.size_bytes):
            return False
        size_bytes, max_tensors = self.blob.size_bytes, self._gate.max_tensors
        self._gate.check_header(schema.parse_header(prefix, size_bytes, max_tensors=max_tensors))
        return True


class BlobGate:
    """What blobs of one kind must pass: a size, a header, a content."""

    def __init__(self, kind: str, max_bytes: int, max_tensors: int) -> None:
        self._kind = kind
        self.max_bytes = max_bytes
        self.max_tensors = max_tensors

    def check_size(self, size_bytes: int) -> None:
        if not 0 < size_bytes <= self.max_bytes:
            raise InvalidError(
                f"{self._kind} of {size_bytes} bytes; the server takes at most {self.max_bytes}",
                Reason.SIZE_LIMIT,
            )

    def check_header(self, header: schema.Header) -> None:
        raise NotImplementedError

    def check_content(self, path: Path) -> None:
        raise NotImplementedError


class WeightsGate(BlobGate):
    """Weights have the run's names, shapes and dtypes, are encoded as they should be, and finite.

    Differences may be from any base here, or what comes late would be refused: see `Uploads.check_base`.
    """

    def __init__(self, expected: schema.Schema, wires: Sequence[Wire]) -> None:
        encoded = [wire.wire_schema(expected, each).values() for each in wires]
        num_bytes = max(sum(tensor.num_bytes for tensor in tensors) for tensors in encoded)
        max_tensors = max(map(len, encoded))
        super().__init__("weights", schema.most_file_bytes(num_bytes), max_tensors)
        self._expected = expected
        self._wires = wires

    def check_header(self, header: schema.Header) -> None:
        found = wire.encoding_of(header)
        allowed = found.wire if found.wire in self._wires else self._wires[0]
        wire.check_encoded(header, self._expected, allowed, base_digest=found.base)

    def check_content(self, path: Path) -> None:
        wire.check_values(path, schema.read_header(path))


class DataGate(BlobGate):
    """A shard has the dataset's image shape and its labels."""

    def __init__(self, spec: DatasetSpec, max_bytes: int) -> None:
        super().__init__("data", max_bytes, max_tensors=2)
        self._spec = spec

    def check_header(self, header: schema.Header) -> None:
        schema.check_shard(header, image_shape=self._spec.image_shape)

    def check_content(self, path: Path) -> None:
        schema.check_labels(path, schema.read_header(path), self._spec.num_classes)


def _durable_size(path: Path) -> int:
    """What survives a power cut: the file is flushed before its size is promised."""
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
