"""What one agent, and all together, can make the server take: real calls; only the trainer is the test's."""

import asyncio
import hashlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ecavg.cloud_server.door import limits
from ecavg.cloud_server.upkeep import caretaker
from ecavg.common import rpc
from ecavg.common.errors import BudgetError, BusyError, Reason
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import Blob, blob_of
from ecavg.edge_agent.enrolment import Enrolment
from tests.integration.test_identity import (
    JOIN,
    member,
    refusal_of,
    served,
    serving,
    stub_with,
    until,
)

__all__ = ["served"]

SHARD_BYTES = 100_000  # of the largest shard; with the weights an agent may have four times that here


def shard(folder: Path, seed: int, num_examples: int = 1000) -> tuple[Path, Blob]:
    """Of 80 KB, unless it is said otherwise."""
    path = folder / f"shard-{seed}-{num_examples}.safetensors"
    images = np.random.default_rng(seed).integers(0, 256, (num_examples, 1, 8, 8), np.uint8)
    write_shard(path, Shard(images, np.zeros(num_examples, np.int64)))
    return path, blob_of(path)


def ignore(done: int, total: int) -> None: ...


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.05)


async def test_agent_over_its_budget_is_told_what_to_do_and_others_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path, max_agent_bytes=200_000) as served:
        hoarder, other = await served.enroll("hoarder"), await served.enroll("other")
        async with member(served, hoarder) as client, member(served, other) as another:
            for seed in range(2):
                await client.upload(*shard(tmp_path, seed), "data", ignore)
            with pytest.raises(BudgetError, match=r"hoarder would wait .*raise max_agent_bytes") as refused:
                await client.upload(*shard(tmp_path, 2), "data", ignore)
            assert refused.value.reason is Reason.AGENT_BUDGET
            await client.upload(*shard(tmp_path, 3, 100), "data", ignore)  # there is room for a small one
            await another.upload(*shard(tmp_path, 2), "data", ignore)
        status = await served.here.status.read()
        states = {agent["agent_id"]: agent["outcome"] for agent in status["agents"]}
        assert states == {"hoarder": "rejected", "other": None}


async def test_what_was_contributed_does_not_count(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, max_agent_bytes=200_000) as served,
        member(served, await served.enroll("edge-1")) as client,
    ):
        shards = [shard(tmp_path, seed) for seed in range(2)]
        for path, blob in shards:
            await client.upload(path, blob, "data", ignore)
        contribution = await served.here.contribution_of("edge-1")
        start = contribution.initial_digest
        verdict = await client.contribute(
            1,
            weights=Blob(contribution.weights_digest, 0),
            shards=[blob for _, blob in shards],
            num_examples=2000,
            score_local=None,
            initial_weights=start,
        )
        assert verdict.outcome == "accepted"
        for seed in (2, 3):  # for the next round
            await client.upload(*shard(tmp_path, seed), "data", ignore)


async def test_streams_count_as_what_they_have_declared(tmp_path: Path) -> None:
    """So that nobody gets in with several at once what he does not get in one after the other."""
    async with serving(tmp_path, max_agent_bytes=200_000) as served:
        identity = await served.enroll("edge-1")
        async with member(served, identity), stub_with(served.address, identity.material) as stub:

            def stream(seed: int) -> Any:
                _, blob = shard(tmp_path, seed)
                header = pb.UploadHeader(digest=blob.digest, kind=2, size_bytes=blob.size_bytes)
                call = stub.Upload()
                return call, asyncio.ensure_future(call.write(pb.UploadRequest(header=header)))

            calls = [stream(seed) for seed in range(5)]
            done, waiting = set(), {asyncio.ensure_future(call.code()) for call, _ in calls}
            while len(waiting) > 2:  # nothing has been sent on those that are let
                ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done |= ended
            assert {task.result() for task in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            for call, _ in calls:
                call.cancel()
            await until(lambda: not served.here.coordinator._uploads.active)


async def test_all_agents_together_have_a_budget_for_the_round(tmp_path: Path) -> None:
    async with serving(tmp_path, max_round_bytes=200_000) as served:
        for number, is_last in ((1, False), (2, False), (3, True)):
            async with member(served, await served.enroll(f"edge-{number}")) as client:
                if not is_last:
                    await client.upload(*shard(tmp_path, number), "data", ignore)
                    continue
                with pytest.raises(BudgetError, match="all agents together") as refused:
                    await client.upload(*shard(tmp_path, number), "data", ignore)
                assert refused.value.reason is Reason.ROUND_BUDGET


async def test_ordinary_agent_with_many_shards_meets_no_limit(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, max_upload_bytes=100_000) as served,
        member(served, await served.enroll("edge-1")) as client,
    ):
        waits = []
        client._on_waiting = waits.append
        for seed in range(60):
            await client.upload(*shard(tmp_path, seed, 10), "data", ignore)
        assert waits == []


async def test_upload_that_was_given_up_is_freed_though_the_round_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caretaker, "CLEAN_UP_SECONDS", 0.1)
    async with serving(tmp_path, keep_partial_seconds=3600) as served:
        identity = await served.enroll("edge-1")
        async with member(served, identity), stub_with(served.address, identity.material) as stub:
            path, blob = shard(tmp_path, 1)
            header = pb.UploadHeader(digest=blob.digest, kind=2, size_bytes=blob.size_bytes)
            content = await asyncio.to_thread(path.read_bytes)
            messages = [pb.UploadRequest(header=header), pb.UploadRequest(chunk=content[:50_000])]
            refused = await refusal_of(stub.Upload(iter(messages)))
            assert refused.reason is Reason.SIZE_MISMATCH
            partial = served.folder / "server/partial"
            (file,) = partial.iterdir()
            assert file.stat().st_size == 50_000
            os.utime(file, (0, 0))  # as if an hour had passed
            await until(lambda: not list(partial.iterdir()))


async def test_run_takes_so_many_agents_and_no_more(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, is_insecure=True, max_joined=3) as served,
        stub_with(served.address, None) as stub,
    ):

        def join(name: str) -> Any:
            return stub.Join(JOIN, metadata=((rpc.AGENT_ID_KEY, name),))

        outcomes = await asyncio.gather(*(join(f"edge-{n}") for n in range(10)), return_exceptions=True)
        refusals = [rpc.error_from(each) for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
        assert {refusal.reason for refusal in refusals} == {Reason.RUN_FULL}
        assert len(refusals) == 7
        assert "raise max_joined" in str(refusals[0])
        members = [agent.agent_id for agent in served.here.store.agents()]
        assert len(members) == 3
        await join(members[0])  # who is in may come again


@pytest.fixture
def _two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls at once, and for minutes no third one, at the rate that the tests here set."""
    monkeypatch.setattr(limits, "BURST_SECONDS", 1000.0)


@pytest.mark.usefixtures("_two_calls")
async def test_calls_are_counted_by_name_on_a_plaintext_server(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, is_insecure=True, calls_per_second=0.002) as served,
        stub_with(served.address, None) as stub,
    ):
        metadata = ((rpc.AGENT_ID_KEY, "edge-1"),)
        for _ in range(2):
            await stub.Join(JOIN, metadata=metadata)
        refused = await refusal_of(stub.Join(JOIN, metadata=metadata))
        assert isinstance(refused, BusyError)
        assert refused.reason is Reason.CALL_RATE
        await stub.Join(JOIN, metadata=((rpc.AGENT_ID_KEY, "edge-2"),))


@pytest.mark.usefixtures("_two_calls")
async def test_bearers_of_one_token_are_counted_together(tmp_path: Path) -> None:
    async with serving(tmp_path, calls_per_second=0.002) as served:
        token = served.token(uses=10)
        reasons = []
        for name in ("edge-1", "edge-2", "edge-3"):
            folder = served.folder / name / "tls"
            folder.parent.mkdir()
            enrolment = Enrolment(folder, name, token, served.address)
            material = await asyncio.to_thread(enrolment.material)
            async with stub_with(served.address, material) as stub:
                try:
                    await stub.Enroll(pb.EnrollRequest(request=enrolment.request))
                    reasons.append(None)
                except grpc.aio.AioRpcError as error:
                    reasons.append(rpc.error_from(error).reason)
        assert reasons == [None, None, Reason.CALL_RATE]


async def test_agent_that_calls_too_often_waits_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 1.0)
    async with (
        serving(tmp_path, calls_per_second=5) as served,
        member(served, await served.enroll("eager")) as client,
    ):

        def num_refused() -> float:
            registry = served.here.metrics.registry
            return registry.get_sample_value("ecavg_server_refusals_total", {"reason": "call_rate"}) or 0.0

        for seed in itertools.count():  # two calls each, of fifty that it has at once
            await client.upload(*shard(tmp_path, seed, 4), "data", ignore)
            if num_refused():
                break


async def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as served,
        member(served, await served.enroll("edge-1")) as client,
    ):
        query = pb.QueryUploadRequest(digest=hashlib.sha256().hexdigest(), kind=0)
        refused = await refusal_of(client._stub.QueryUpload(query))
        registry = served.here.metrics.registry
        assert registry.get_sample_value("ecavg_server_refusals_total", {"reason": refused.reason.value}) == 1


async def test_health_of_the_server_can_be_watched(served: Any) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    identity = await served.enroll("edge-1")
    channel = rpc.channel(served.address, identity.material)
    call: AsyncIterator[Any] = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    reply = await anext(aiter(call))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    await channel.close()  # type: ignore[call-arg]
