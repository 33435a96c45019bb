"""A crowd of small agents in one process, written from the .proto alone, and what each of them lived through.

An agent joins, watches, sends a shard, and in every round downloads the weights, changes them a little in the
place of a training, uploads them, contributes, takes the new model and reports. At random, an agent hangs up
after its contribution and comes back a moment later on a new connection.
"""

import asyncio
import contextlib
import hashlib
import random
import resource
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
import numpy as np
from safetensors.numpy import save

from ecavg.common import rpc
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN
from ecavg.common.tls import SERVER_NAME, TlsMaterial

# Everyone stays in line for so long; a benchmark has no use for an agent that gives up.
CALL_SECONDS = 600.0
# The agents of the product, too, connect again after these.
BROKEN_OFF = {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
IMAGES = 8
# An agent that hangs up comes back after at most this time.
MOST_SECONDS_AWAY = 2.0


class Plan(NamedTuple):
    """What the agents of one process are to do."""

    address: str
    names: tuple[str, ...]
    # The key, certificate and root of each agent; None: plaintext.
    materials: tuple[TlsMaterial, ...] | None
    num_rounds: int
    # The share of contributions after which an agent hangs up and comes back.
    leaving: float
    seed: int


@dataclass
class Life:
    """What one agent lived through. Times are in seconds since the epoch."""

    name: str
    # The seconds that each call took, by its name.
    seconds: dict[str, list[float]] = field(default_factory=dict)
    # When the agent knew of the model of each round, if it was connected when the model was published.
    known_at: dict[int, float] = field(default_factory=dict)
    # How the contribution to each round was answered, and the rounds whose models counted it.
    outcomes: dict[int, str] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    # The rounds on whose models the agent's report was answered.
    reported: set[int] = field(default_factory=set)
    num_events: int = 0
    num_comebacks: int = 0
    # Connections that the server, or the machine, ended in the middle of a call.
    num_broken_off: int = 0
    saw_the_end: bool = False
    began_at: float = 0.0
    ended_at: float = 0.0


def live(plan: Plan) -> list[Life]:
    """Let every agent of the plan take part until the run is over."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    return asyncio.run(_live(plan))


async def _live(plan: Plan) -> list[Life]:
    materials = plan.materials or (None,) * len(plan.names)
    agents = [Agent(plan, name, material) for name, material in zip(plan.names, materials, strict=True)]
    return list(await asyncio.gather(*(agent.live() for agent in agents)))


class Agent:
    """One agent, with a connection of its own."""

    def __init__(self, plan: Plan, name: str, material: TlsMaterial | None) -> None:
        self._plan = plan
        self._material = material
        self._chance = random.Random(f"{plan.seed}-{name}")
        self._shard = _shard(self._chance)
        self._has_sent_shard = False
        # The digest of the weights in use, and the weights.
        self._model = ("", b"")
        # The latest published round that the agent knows of.
        self._latest = 0
        self.lived = Life(name)

    async def live(self) -> Life:
        """Take part until the run is over."""
        self.lived.began_at = time.time()
        while not self.lived.saw_the_end:
            try:
                async with self._connected() as stub:
                    await self._call("Join", stub.Join, pb.JoinRequest(protocol_version=SPOKEN.newest))
                    await self._watch(stub)
            except grpc.aio.AioRpcError as error:
                if error.code() not in BROKEN_OFF:
                    raise
                self.lived.num_broken_off += 1
            if not self.lived.saw_the_end:
                self.lived.num_comebacks += 1
                await asyncio.sleep(self._chance.uniform(0, MOST_SECONDS_AWAY))
        self.lived.ended_at = time.time()
        return self.lived

    async def _watch(self, stub: Any) -> None:
        """Do what each event asks for; return when the run is over, or when this agent hangs up."""
        watch = stub.Watch(pb.WatchRequest(), metadata=self._metadata)
        # The latest event alone matters: an agent that is busy skips those in between.
        latest: asyncio.Queue[Any] = asyncio.Queue()

        async def listen() -> None:
            is_first = True
            async for event in watch:
                self._note(event, is_first)
                is_first = False
                latest.put_nowait(event)
            latest.put_nowait(None)

        listening = asyncio.create_task(listen())
        try:
            while (event := await latest.get()) is not None:
                while not latest.empty() and (newer := latest.get_nowait()) is not None:
                    event = newer
                if event.run_over:
                    self.lived.saw_the_end = True
                    return
                if await self._act(stub, event):
                    return
        finally:
            watch.cancel()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def _note(self, event: Any, is_first: bool) -> None:
        self.lived.num_events += 1
        published = event.latest_model.round
        if published > self._latest:
            self._latest = published
            # An agent that was away when the model was published hears of it in its first event.
            if not is_first:
                self.lived.known_at[published] = time.time()
        if event.counted_round:
            self.lived.counted.add(event.counted_round)

    async def _act(self, stub: Any, event: Any) -> bool:
        """Do what the event asks for, and return True if the agent hangs up after that."""
        model = event.latest_model
        if model.round and model.round not in self.lived.reported:
            await self._fetch(stub, model.weights.digest)
            report = pb.ReportRequest(round=model.round, score_after=0.5, num_held_out=10, applied=True)
            await self._call("Report", stub.Report, report)
            self.lived.reported.add(model.round)
        is_wanted = event.phase == pb.PHASE_COLLECTING and event.round not in self.lived.outcomes
        if not is_wanted or event.outcome:
            return False
        await self._fetch(stub, event.initial_weights.digest)
        await self._contribute(stub, event)
        return self._chance.random() < self._plan.leaving

    async def _contribute(self, stub: Any, event: Any) -> None:
        if not self._has_sent_shard:
            await self._send(stub, self._shard, pb.BLOB_KIND_DATA)
            self._has_sent_shard = True
        weights = _changed(self._model[1], self._chance)
        await self._send(stub, weights, pb.BLOB_KIND_WEIGHTS)
        request = pb.ContributeRequest(
            round=event.round,
            weights_digest=_digest(weights),
            shard_digests=[_digest(self._shard)],
            num_examples=IMAGES,
            score_local=0.5,
            initial_weights_digest=event.initial_weights.digest,
        )
        reply = await self._call("Contribute", stub.Contribute, request)
        self.lived.outcomes[event.round] = pb.Outcome.Name(reply.outcome)

    async def _send(self, stub: Any, content: bytes, kind: Any) -> None:
        query = pb.QueryUploadRequest(digest=_digest(content), kind=kind)
        await self._call("QueryUpload", stub.QueryUpload, query)
        header = pb.UploadHeader(digest=_digest(content), kind=kind, size_bytes=len(content))
        messages = [pb.UploadRequest(header=header), pb.UploadRequest(chunk=content)]
        await self._call("Upload", stub.Upload, iter(messages))

    async def _fetch(self, stub: Any, digest: str) -> None:
        if self._model[0] == digest:
            return
        content = await self._timed("Download", self._download(stub, digest))
        assert _digest(content) == digest
        self._model = (digest, content)

    async def _download(self, stub: Any, digest: str) -> bytes:
        call = stub.Download(pb.DownloadRequest(digest=digest), metadata=self._metadata, timeout=CALL_SECONDS)
        return b"".join([reply.chunk async for reply in call])

    async def _call(self, name: str, method: Any, request: Any) -> Any:
        return await self._timed(name, method(request, metadata=self._metadata, timeout=CALL_SECONDS))

    async def _timed(self, name: str, call: Awaitable[Any]) -> Any:
        started = time.perf_counter()
        reply = await call
        self.lived.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return reply

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((rpc.AGENT_ID_KEY, self.lived.name),)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        # Without the last option, all agents of this process would share one connection.
        options = [*rpc.channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        address, material = self._plan.address, self._material
        if material:
            credentials = grpc.ssl_channel_credentials(material.roots, material.key, material.certificate)
            options.append(("grpc.ssl_target_name_override", SERVER_NAME))
            channel = grpc.aio.secure_channel(address, credentials, options=options)
        else:
            channel = grpc.aio.insecure_channel(address, options=options)
        async with channel:
            await channel.channel_ready()
            yield pb_grpc.ECAvgStub(channel)  # type: ignore[no-untyped-call]


def _shard(chance: random.Random) -> bytes:
    images = np.frombuffer(chance.randbytes(IMAGES * 64), np.uint8).reshape(IMAGES, 1, 8, 8)
    labels = np.frombuffer(chance.randbytes(IMAGES), np.uint8).astype(np.int64) % 10
    return save({"images": images, "labels": labels})


def _changed(weights: bytes, chance: random.Random) -> bytes:
    """Return other weights in place of trained ones: the values of a safetensors file, changed a little."""
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    values = np.frombuffer(weights, np.float32, offset=start)
    noise = np.random.default_rng(chance.getrandbits(32)).normal(0, 0.01, len(values))
    return weights[:start] + (values + noise).astype(np.float32).tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def calls_of(lives: list[Life]) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each call, and the seconds that it took all agents."""
    for name in ("Join", "QueryUpload", "Upload", "Contribute", "Download", "Report"):
        yield name, sorted(each for life in lives for each in life.seconds.get(name, ()))
