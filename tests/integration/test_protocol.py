"""What the server answers on the wire: a real server process, and calls that no good agent makes."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.numpy import load_file, save_file

from ecavg.common import rpc
from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.errors import (
    ConflictError,
    InvalidError,
    NotFoundError,
    OffsetError,
    Reason,
    Refusal,
    UnavailableError,
)
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN
from ecavg.common.run_state import RunState, Verdict
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import Blob, blob_of
from ecavg.edge_agent.client import CloudClient, Joined, Kind
from ecavg.edge_agent.metrics import AgentMetrics
from tests.processes import WAIT_SECONDS, Cluster, cluster_in

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One server for all tests here, whose round stays open."""
    with cluster_in(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.server("--min-agents", 1000)
        yield cluster


class Member(CloudClient):
    """An agent that has joined, and what it needs to misbehave."""

    joined: Joined
    state: RunState
    stub: Any
    metadata: Any


@asynccontextmanager
async def member(cluster: Cluster, name: str) -> AsyncIterator[Member]:
    client = Member(f"127.0.0.1:{cluster.port}", cluster.enroll(name), AgentMetrics())
    client.stub, client.metadata = client._stub, client._metadata
    try:
        client.joined = await client.join()
        watch = client.watch()
        client.state = await anext(watch)
        await watch.aclose()
        yield client
    finally:
        await client.close()


def ignore(done: int, total: int) -> None: ...


async def initial_weights(client: Member, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "initial.safetensors"
    await client.download(client.state.initial_weights, path, ignore)
    return load_file(path)


async def contribute(client: Member, weights: Blob, **changes: Any) -> Verdict:
    start = client.state.initial_weights.digest
    fields = {"shards": [], "num_examples": 1, "score_local": None, "initial_weights": start}
    return await client.contribute(1, weights=weights, **(fields | changes))


async def upload(client: Member, path: Path, kind: Kind = "weights") -> Blob:
    blob = blob_of(path)
    await client.upload(path, blob, kind, ignore)
    return blob


def written(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    path = folder / "weights.safetensors"
    save_file(weights, path)
    return path


def shard_file(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path = folder / "shard.safetensors"
    write_shard(path, Shard(images, labels))
    return path


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("bias", "prejudice"): value for name, value in weights.items()}


def reshaped(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights | {"1.weight": weights["1.weight"][:, :-1].copy()}


def retyped(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights | {"1.weight": weights["1.weight"].astype(np.float64)}


def with_value(value: float) -> Any:
    def changed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        bias = weights["1.bias"].copy()
        bias[3] = value
        return weights | {"1.bias": bias}

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, Reason.SCHEMA_MISMATCH),
        (reshaped, Reason.SCHEMA_MISMATCH),
        (retyped, Reason.SCHEMA_MISMATCH),
        (with_value(np.nan), Reason.NON_FINITE),
        (with_value(-np.inf), Reason.NON_FINITE),
    ],
)
async def test_unfit_weights_are_refused_and_the_round_goes_on(
    cluster: Cluster, tmp_path: Path, change: Any, reason: Reason
) -> None:
    async with member(cluster, tmp_path.name) as client:
        weights = await initial_weights(client, tmp_path)
        with pytest.raises(InvalidError) as refused:
            await upload(client, written(tmp_path, change(weights)))
        assert refused.value.reason == reason
        assert "1." in str(refused.value)  # names the tensor
        assert await outcome(client) == pb.OUTCOME_REJECTED

        blob = await upload(client, written(tmp_path, weights))
        verdict = await contribute(client, blob)
        assert verdict.outcome == "accepted"
        assert await outcome(client) == pb.OUTCOME_ACCEPTED


async def outcome(client: Member) -> Any:
    call = client.stub.Watch(pb.WatchRequest(), metadata=client.metadata)
    event = await call.read()
    call.cancel()
    return event.outcome


async def test_file_that_is_no_safetensors_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x04\x95" + bytes(1000))  # as a pickle begins
    async with member(cluster, "pickler") as client:
        with pytest.raises(InvalidError) as refused:
            await upload(client, path)
        assert refused.value.reason == Reason.INVALID_FILE


@pytest.mark.parametrize(
    ("shape", "label"), [((4, 3, 8, 8), 0), ((4, 1, 8, 9), 0), ((4, 1, 8, 8), 10), ((4, 1, 8, 8), -1)]
)
async def test_unfit_shard_is_refused(
    cluster: Cluster, tmp_path: Path, shape: tuple[int, ...], label: int
) -> None:
    async with member(cluster, "unfit-shard") as client:
        path = shard_file(tmp_path, np.zeros(shape, np.uint8), np.array([0, 1, 2, label]))
        with pytest.raises(InvalidError) as refused:
            await upload(client, path, "data")
        assert refused.value.reason == Reason.INVALID_SHARD


async def test_bytes_that_do_not_match_their_digest_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "corrupt") as client:
        path = shard_file(tmp_path, np.zeros((4, 1, 8, 8), np.uint8), np.arange(4))
        blob = Blob("0" * 64, path.stat().st_size)
        with pytest.raises(Refusal) as refused:
            await client.upload(path, blob, "data", ignore)
        assert refused.value.reason == Reason.DIGEST_MISMATCH
        reply = await client.stub.QueryUpload(
            pb.QueryUploadRequest(digest=blob.digest, kind=pb.BLOB_KIND_DATA), metadata=client.metadata
        )
        assert (reply.received_bytes, reply.complete) == (0, False)


async def test_upload_resumes_where_it_broke_off(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "resuming") as client:
        images = np.random.default_rng(0).integers(0, 256, (50_000, 1, 8, 8), np.uint8)
        path = shard_file(tmp_path, images, np.zeros(50_000, np.int64))
        blob = blob_of(path)
        header = pb.UploadHeader(digest=blob.digest, kind=pb.BLOB_KIND_DATA, size_bytes=blob.size_bytes)
        call = client.stub.Upload(metadata=client.metadata)
        await call.write(pb.UploadRequest(header=header))
        with path.open("rb") as file:
            for _ in range(2):
                await call.write(pb.UploadRequest(chunk=file.read(1 << 20)))
        query = pb.QueryUploadRequest(digest=blob.digest, kind=pb.BLOB_KIND_DATA)
        async with asyncio.timeout(WAIT_SECONDS):
            while not has_part_of(cluster, blob):  # noqa: ASYNC110  it is another process that changes
                await asyncio.sleep(0.01)
        # The query ends the stream that is still open, so it comes when something has been stored.
        reply = await client.stub.QueryUpload(query, metadata=client.metadata)
        assert 0 < reply.received_bytes <= 2 << 20
        call.cancel()

        offsets: list[int] = []
        await client.upload(path, blob, "data", lambda done, total: offsets.append(done))
        assert offsets[0] == reply.received_bytes
        assert offsets[-1] == blob.size_bytes
        again = await client.stub.QueryUpload(query, metadata=client.metadata)
        assert (again.received_bytes, again.complete) == (blob.size_bytes, True)


def has_part_of(cluster: Cluster, blob: Blob) -> bool:
    return any(path.stat().st_size for path in cluster.state_dir.glob(f"partial/*{blob.digest}*"))


async def refusal_of(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return rpc.error_from(error.value)


async def test_upload_elsewhere_than_at_the_end_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "jumping") as client:
        header = pb.UploadHeader(digest="1" * 64, kind=pb.BLOB_KIND_DATA, size_bytes=100, offset=50)
        requests = iter([pb.UploadRequest(header=header), pb.UploadRequest(chunk=b"x")])
        refused = await refusal_of(client.stub.Upload(requests, metadata=client.metadata))
        assert isinstance(refused, OffsetError)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"size_bytes": 2**40}, Reason.SIZE_LIMIT),
        ({"size_bytes": 0}, Reason.SIZE_LIMIT),
        ({"digest": "../../etc/passwd"}, Reason.MALFORMED_REQUEST),
        ({"kind": pb.BLOB_KIND_UNSPECIFIED}, Reason.MALFORMED_REQUEST),
    ],
)
async def test_senseless_headers_are_refused(cluster: Cluster, header: Any, reason: Reason) -> None:
    fields = {"digest": "2" * 64, "kind": pb.BLOB_KIND_DATA, "size_bytes": 100} | header
    async with member(cluster, "senseless") as client:
        requests = iter([pb.UploadRequest(header=pb.UploadHeader(**fields))])
        refused = await refusal_of(client.stub.Upload(requests, metadata=client.metadata))
        assert refused.reason == reason


async def test_more_bytes_than_declared_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "endless") as client:
        path = shard_file(tmp_path, np.zeros((4, 1, 8, 8), np.uint8), np.arange(4))
        header = pb.UploadHeader(digest="3" * 64, kind=pb.BLOB_KIND_DATA, size_bytes=path.stat().st_size)
        chunk = pb.UploadRequest(chunk=path.read_bytes())
        requests = iter([pb.UploadRequest(header=header), chunk, chunk])
        refused = await refusal_of(client.stub.Upload(requests, metadata=client.metadata))
        assert refused.reason == Reason.SIZE_MISMATCH


async def test_contribution_counts_once_and_another_one_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "twice") as client:
        weights = await initial_weights(client, tmp_path)
        first = await upload(client, written(tmp_path, weights))
        second = await upload(client, written(tmp_path, with_value(0.5)(weights)))
        for _ in range(2):
            verdict = await contribute(client, first, num_examples=7, score_local=0.5)
            assert verdict.outcome == "accepted"
        with pytest.raises(ConflictError):
            await contribute(client, second, num_examples=7, score_local=0.5)


async def test_num_examples_is_held_against_the_shards(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "boaster") as client:
        weights = await upload(client, written(tmp_path, await initial_weights(client, tmp_path)))
        path = shard_file(tmp_path, np.full((4, 1, 8, 8), 7, np.uint8), np.arange(4))
        shards = [await upload(client, path, "data")]
        with pytest.raises(InvalidError, match=r"num_examples is 3, .* 4 examples") as refused:
            await contribute(client, weights, shards=shards, num_examples=3)
        assert refused.value.reason == Reason.MALFORMED_REQUEST
        assert (await contribute(client, weights, shards=shards, num_examples=5)).outcome == "accepted"


async def test_pretraining_from_other_initial_weights_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "elsewhere") as client:
        blob = await upload(client, written(tmp_path, await initial_weights(client, tmp_path)))
        for start, text in ((None, "weights of the agent's own"), ("5" * 64, "5555555555555555…")):
            with pytest.raises(InvalidError, match=f"pre-training started from {text}") as refused:
                await contribute(client, blob, initial_weights=start)
            assert refused.value.reason == Reason.INITIAL_WEIGHTS
            assert await outcome(client) == pb.OUTCOME_REJECTED
        with pytest.raises(InvalidError, match="64 lower-case hex") as refused:
            await contribute(client, blob, initial_weights="../../etc/passwd")
        assert refused.value.reason == Reason.MALFORMED_REQUEST
        assert (await contribute(client, blob)).outcome == "accepted"


async def test_contribution_of_blobs_of_others_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "owner") as owner, member(cluster, "thief") as thief:
        blob = await upload(owner, written(tmp_path, await initial_weights(owner, tmp_path)))
        with pytest.raises(NotFoundError) as refused:
            await contribute(thief, blob)
        assert refused.value.reason == Reason.MISSING_BLOB


async def test_only_initial_weights_and_published_models_can_be_read(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with member(cluster, "private") as owner, member(cluster, "reader") as reader:
        path = shard_file(tmp_path, np.ones((4, 1, 8, 8), np.uint8), np.arange(4))
        blob = await upload(owner, path, "data")
        with pytest.raises(NotFoundError):
            await reader.download(blob, tmp_path / "stolen", ignore)
        with pytest.raises(NotFoundError):
            await owner.download(blob, tmp_path / "own", ignore)


async def test_download_goes_on_from_an_offset(cluster: Cluster, tmp_path: Path) -> None:
    async with member(cluster, "reading") as client:
        blob = client.state.initial_weights
        whole = tmp_path / "whole"
        await client.download(blob, whole, ignore)
        for offset in (1000, blob.size_bytes):
            request = pb.DownloadRequest(digest=blob.digest, offset=offset)
            first, *others = [
                reply async for reply in client.stub.Download(request, metadata=client.metadata)
            ]
            assert b"".join(reply.chunk for reply in (first, *others)) == whole.read_bytes()[offset:]
            assert first.size_bytes == blob.size_bytes
            assert [reply for reply in others if reply.size_bytes] == []
        request = pb.DownloadRequest(digest=blob.digest, offset=blob.size_bytes + 1)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(aiter(client.stub.Download(request, metadata=client.metadata)))
        assert isinstance(rpc.error_from(error.value), OffsetError)


async def test_who_has_not_joined_gets_nothing(cluster: Cluster) -> None:
    outsider = CloudClient(f"127.0.0.1:{cluster.port}", cluster.enroll("outsider"), AgentMetrics())
    query = pb.QueryUploadRequest(digest="0" * 64, kind=pb.BLOB_KIND_DATA)
    refused = await refusal_of(outsider._stub.QueryUpload(query))
    assert refused.reason == Reason.UNKNOWN_AGENT
    await outsider.close()


async def shown_of(cluster: Cluster, name: str) -> dict[str, Any] | None:
    """Return what the status says that an agent is doing."""
    async with httpx.AsyncClient(trust_env=False) as page:
        status = (await page.get(f"http://127.0.0.1:{cluster.http_port}/api/status")).json()
    progress: dict[str, Any] | None
    (progress,) = [agent["progress"] for agent in status["agents"] if agent["agent_id"] == name]
    return progress


async def test_progress_is_shown_of_an_agent_that_watches_and_of_no_other(cluster: Cluster) -> None:
    outsider = CloudClient(f"127.0.0.1:{cluster.port}", cluster.enroll("silent"), AgentMetrics())
    refused = await refusal_of(outsider._stub.Progress(pb.ProgressRequest()))
    assert refused.reason == Reason.UNKNOWN_AGENT
    await outsider.close()
    training = AgentProgress(Activity.PRE_TRAINING, 3, 10, math.nan)
    async with member(cluster, "telling") as client:
        assert await client.tell_progress(training) == 1.0
        assert await shown_of(cluster, "telling") is None
        watch = client.watch()
        await anext(watch)
        assert await client.tell_progress(training) == 1.0
        shown = await shown_of(cluster, "telling")
        assert shown
        # What is told again within a second is dropped, and a loss that is no number is not shown.
        await client.tell_progress(training._replace(done=9))
        assert await shown_of(cluster, "telling") == shown
        assert (shown["phase"], shown["done"], shown["total"], shown["loss"]) == ("pre_training", 3, 10, None)
        await client.tell_progress(None)
        assert await shown_of(cluster, "telling") is None
        await watch.aclose()


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (pb.ProgressRequest(activity=99, done=1, total=2), None),  # of a newer agent
        (pb.ProgressRequest(activity=pb.ACTIVITY_READING, done=7, total=5), (5, 5)),
        (pb.ProgressRequest(activity=pb.ACTIVITY_READING, done=7), (7, None)),
    ],
)
async def test_odd_progress_is_shown_as_far_as_it_makes_sense(
    cluster: Cluster, request_: pb.ProgressRequest, shown: tuple[int, int] | None
) -> None:
    async with member(cluster, "odd") as client:
        watch = client.watch()
        await anext(watch)
        await client.stub.Progress(request_, metadata=client.metadata)
        found = await shown_of(cluster, "odd")
        assert (found and (found["done"], found["total"])) == shown
        await client.stub.Progress(pb.ProgressRequest(), metadata=client.metadata)
        await watch.aclose()


async def test_progress_beyond_all_bounds_is_refused(cluster: Cluster) -> None:
    async with member(cluster, "immense") as client:
        request = pb.ProgressRequest(activity=pb.ACTIVITY_READING, done=2**63)
        refused = await refusal_of(client.stub.Progress(request, metadata=client.metadata))
        assert refused.reason == Reason.MALFORMED_REQUEST


async def test_other_protocol_versions_are_refused(cluster: Cluster) -> None:
    async with member(cluster, "old") as client:
        refused = await refusal_of(
            client.stub.Join(pb.JoinRequest(protocol_version=99), metadata=client.metadata)
        )
        assert refused.reason == Reason.PROTOCOL_MISMATCH


async def test_same_agent_keeps_its_slot(cluster: Cluster) -> None:
    async with member(cluster, "regular") as client:
        slot = client.joined.slot
    async with member(cluster, "newcomer") as other:
        assert other.joined.slot != slot
    async with member(cluster, "regular") as client:
        assert client.joined.slot == slot


async def test_report_on_an_unpublished_round_is_refused(cluster: Cluster) -> None:
    async with member(cluster, "early") as client:
        request = pb.ReportRequest(round=1, score_after=0.5)
        refused = await refusal_of(client.stub.Report(request, metadata=client.metadata))
        assert isinstance(refused, NotFoundError)


async def test_report_of_an_impossible_accuracy_is_refused(cluster: Cluster) -> None:
    async with member(cluster, "boaster") as client:
        request = pb.ReportRequest(round=1, score_after=0.5, score_adapted=1.5)
        refused = await refusal_of(client.stub.Report(request, metadata=client.metadata))
        assert refused.reason == Reason.MALFORMED_REQUEST
        assert str(refused) == "score_adapted must be a number from 0 to 1"


async def test_health_and_reflection_answer(cluster: Cluster) -> None:
    async with rpc.channel(f"127.0.0.1:{cluster.port}", cluster.enroll("watcher").material) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "ecavg.v1.ECAvg"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = [reply async for reply in reflection.ServerReflectionInfo(iter([request]))]
        services = {service.name for service in replies[0].list_services_response.service}
        assert "ecavg.v1.ECAvg" in services


async def test_server_out_of_reach_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        stub = pb_grpc.ECAvgStub(channel)
        refused = await refusal_of(stub.Join(pb.JoinRequest(protocol_version=SPOKEN.newest)))
        assert isinstance(refused, UnavailableError)
