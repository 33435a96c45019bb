"""Who may come in: a real server and real connections; only the trainer and the clock are the test's."""

import asyncio
import os
import signal
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.x509 import DNSName
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ecavg.cloud_server.door.authority import Authority, CaNotValidError
from ecavg.cloud_server.server import GrpcServer
from ecavg.common import rpc, tls
from ecavg.common.background import beside
from ecavg.common.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Reason,
    Refusal,
    UnauthenticatedError,
    UsageError,
)
from ecavg.common.faults import Point
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import Blob, blob_of
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.enrolment import Enrolment, enroll
from ecavg.edge_agent.identity import Identity, find
from ecavg.edge_agent.metrics import AgentMetrics
from tests.processes import ROOT, WAIT_SECONDS, Cluster
from tests.unit.world import World, world

HOUR = 3600.0


class Clock:
    """The server's, moved by the test."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_seconds


class Served:
    """A server on a port of its own."""

    def __init__(self, folder: Path, here: World, authority: Authority | None, clock: Clock) -> None:
        self.folder, self.here, self.clock = folder, here, clock
        self.address = ""
        self._authority = authority

    @property
    def authority(self) -> Authority:
        assert self._authority
        return self._authority

    def token(self, uses: int = 1, ttl_seconds: float = HOUR) -> tls.JoinToken:
        return tls.JoinToken.parse(self.authority.create_token(uses, ttl_seconds))

    async def enroll(self, name: str, token: tls.JoinToken | None = None) -> Identity:
        """Over the wire, as `edge-agent enroll` does it."""
        folder = self.folder / name / "tls"
        folder.parent.mkdir(exist_ok=True)
        enrolment = Enrolment(folder, name, token or self.token(), self.address)
        return await enroll(enrolment, self.address, lambda _: None)


@asynccontextmanager
async def serving(
    folder: Path, *, is_insecure: bool = False, calls_per_second: float = 200, **keys: Any
) -> AsyncIterator[Served]:
    clock = Clock()
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(world(folder / "server", **{"min_agents": 1000} | keys))
        authority = None
        if not is_insecure:
            authority = stack.enter_context(closing(Authority(folder / "server/tls", clock)))
        server = GrpcServer(here.metrics, authority, max_connections=512, calls_per_second=calls_per_second)
        served = Served(folder, here, authority, clock)
        served.address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
        await server.start(here.desk)
        stack.push_async_callback(server.stop, 0)
        await stack.enter_async_context(beside(server.guard()))
        yield served


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.05)


@asynccontextmanager
async def member(served: Served, caller: Identity | str, *, join: bool = True) -> AsyncIterator[CloudClient]:
    client = CloudClient(served.address, caller, AgentMetrics())
    try:
        if join:
            await client.join()
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def stub_with(address: str, material: tls.TlsMaterial | None) -> AsyncIterator[Any]:
    channel = rpc.channel(address, material)
    try:
        yield pb_grpc.ECAvgStub(channel)
    finally:
        await channel.close()  # type: ignore[call-arg]


async def refusal_of(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return rpc.error_from(error.value)


def shard(folder: Path) -> tuple[Path, Blob]:
    path = folder / "shard.safetensors"
    write_shard(path, Shard(np.zeros((2000, 1, 8, 8), np.uint8), np.zeros(2000, np.int64)))
    return path, blob_of(path)


async def drain(states: AsyncIterator[Any]) -> None:
    async for _ in states:
        pass


async def until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  it is gRPC's threads that change it
            await asyncio.sleep(0.01)


JOIN = pb.JoinRequest(protocol_version=SPOKEN.newest)


# ---------------------------------------------------------------------- enrolment


async def test_enrolled_agent_is_whom_its_certificate_names(served: Served) -> None:
    identity = await served.enroll("edge-1")
    async with stub_with(served.address, identity.material) as stub:
        reply = await stub.Join(JOIN, metadata=((rpc.AGENT_ID_KEY, "edge-2"),))
        assert reply.slot == 1
    assert [agent.agent_id for agent in served.here.store.agents()] == ["edge-1"]


async def test_keys_and_folders_are_the_owners_alone(served: Served) -> None:
    await served.enroll("edge-1")
    for folder in (served.folder / "server/tls", served.folder / "edge-1/tls"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = [*folder.glob("*.key"), *folder.glob("*.pem")]
        assert len(files) in (2, 4)
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_nothing_that_opens_a_door_is_stored(served: Served) -> None:
    """Neither the token nor the key that comes of it is anywhere, on either side."""
    token = served.token(uses=2)
    await served.enroll("edge-1", token)
    secrets = [str(token).encode()[7:], token.secret, token.secret.hex().encode()]
    secrets.append(token.key.private_numbers().private_value.to_bytes(32))
    secrets.append(tls.pem(token.key).splitlines()[1])
    for path in served.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret in content], path


async def test_token_enrolls_as_many_devices_as_it_says(served: Served) -> None:
    token = served.token(uses=2)
    await served.enroll("edge-1", token)
    await served.enroll("edge-2", token)
    with pytest.raises(ForbiddenError, match=r"used up.*cloud-server token create") as refused:
        await served.enroll("edge-3", token)
    assert refused.value.reason is Reason.TOKEN
    assert find(served.folder / "edge-3/tls") is None
    async with member(served, await served.enroll("edge-3")):
        pass


async def test_enrolling_twice_with_the_same_key_costs_one_use(served: Served) -> None:
    """As after an answer that was lost."""
    token = served.token(uses=1)
    first = await served.enroll("edge-1", token)
    again = await served.enroll("edge-1", token)
    assert (first.agent_id, again.agent_id) == ("edge-1", "edge-1")
    assert [row.num_used for row in served.authority.tokens()] == [1]
    for identity in (first, again):
        async with member(served, identity):
            pass


@pytest.mark.parametrize("how", ["expired", "revoked"])
async def test_token_that_has_ended_does_not_pass_the_handshake(served: Served, how: str) -> None:
    token = served.token(uses=5, ttl_seconds=60)
    await served.enroll("edge-1", token)
    if how == "expired":
        served.clock.ahead_seconds = 61
    else:
        served.authority.revoke_token(token.token_id)
    with pytest.raises(UsageError, match="does not take this join token: it has expired, was revoked"):
        await served.enroll("edge-2", token)
    assert [row.agent_id for row in served.authority.agents()] == ["edge-1"]
    with pytest.raises(ForbiddenError, match=how):  # nor what comes over a connection that was open before
        served.authority.enroll(token.token_id, tls.make_request(tls.new_key(), "edge-2"))


async def test_token_of_another_server_is_refused_and_nothing_is_kept(served: Served, tmp_path: Path) -> None:
    with closing(Authority(tmp_path / "other")) as other:
        token = tls.JoinToken.parse(other.create_token(1, HOUR))
    with pytest.raises(UsageError, match="does not take this join token"):
        await served.enroll("edge-1", token)
    assert find(served.folder / "edge-1/tls") is None


class Impostor(pb_grpc.ECAvgServicer):
    """Stands in between: takes whoever comes, and answers with what it likes."""

    def __init__(self, ca_certificate: bytes, own: Authority) -> None:
        self._ca_certificate, self._own = ca_certificate, own

    async def Enroll(self, request: pb.EnrollRequest, _: Any) -> pb.EnrollReply:
        token = tls.JoinToken.parse(self._own.create_token(1, HOUR))
        certificate = self._own.enroll(token.token_id, request.request)
        return pb.EnrollReply(certificate=certificate, ca_certificate=self._ca_certificate)


@pytest.mark.parametrize("shows", ["its own CA", "the true CA", "rubbish"])
async def test_impostor_is_found_out_and_learns_nothing(served: Served, tmp_path: Path, shows: str) -> None:
    token = served.token()
    with closing(Authority(tmp_path / "impostor")) as own:
        answers = {"its own CA": own.ca_certificate, "the true CA": served.authority.ca_certificate}
        material = own.material()._replace(roots=token_root(token))  # it lets our token in
        impostor = grpc.aio.server()
        pb_grpc.add_ECAvgServicer_to_server(Impostor(answers.get(shows, b"rubbish"), own), impostor)
        port = impostor.add_secure_port("127.0.0.1:0", rpc.server_credentials(lambda: material))
        await impostor.start()
        address = f"127.0.0.1:{port}"
        enrolment = Enrolment(tmp_path / "edge-1/tls", "edge-1", token, address)
        with pytest.raises(UsageError, match="is not the server that the join token is of"):
            await enroll(enrolment, address, lambda _: None)
        await impostor.stop(0)
    assert find(tmp_path / "edge-1/tls") is None
    assert served.authority.agents() == []


def token_root(token: tls.JoinToken) -> bytes:
    return tls.pem(token.root())


async def test_another_device_cannot_take_an_agents_id(served: Served) -> None:
    identity = await served.enroll("edge-1")
    thief = Enrolment(served.folder / "thief/tls", "edge-1", served.token(), served.address)
    with pytest.raises(ConflictError, match="another device is enrolled as agent edge-1") as refused:
        await enroll(thief, served.address, lambda _: None)
    assert refused.value.reason is Reason.AGENT_ID_TAKEN
    async with member(served, identity):
        pass


async def test_one_key_is_one_agent(served: Served) -> None:
    """So a token's uses cannot be multiplied with one device's key."""
    token, key = served.token(uses=1), tls.new_key()
    served.authority.enroll(token.token_id, tls.make_request(key, "edge-1"))
    with pytest.raises(ConflictError, match="enrolled as agent edge-1"):
        served.authority.enroll(token.token_id, tls.make_request(key, "edge-2"))


@pytest.mark.parametrize("agent_id", ["../etc", "a b", '"><script>', "-x"])
def test_agent_ids_in_requests_are_restricted(agent_id: str) -> None:
    with pytest.raises(InvalidError, match="an agent id is 1 to 64 letters"):
        tls.read_request(tls.make_request(tls.new_key(), agent_id))


def test_request_that_is_none_is_refused() -> None:
    request = tls.make_request(tls.new_key(), "edge-1")
    for broken in (b"", b"rubbish", request[:-1], request[:-1] + bytes([request[-1] ^ 1])):
        with pytest.raises(InvalidError):
            tls.read_request(broken)


# ---------------------------------------------------------------------- who may call what


async def test_holder_of_a_token_may_enroll_and_nothing_else(served: Served, tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path / "new/tls", "new", served.token(), served.address)
    material = await asyncio.to_thread(enrolment.material)
    channel = rpc.channel(served.address, material)
    stub, health = pb_grpc.ECAvgStub(channel), health_pb2_grpc.HealthStub(channel)
    calls = [
        stub.Join(JOIN),
        stub.QueryUpload(pb.QueryUploadRequest()),
        stub.Renew(pb.RenewRequest(request=enrolment.request)),
        stub.Report(pb.ReportRequest()),
        stub.Contribute(pb.ContributeRequest()),
        stub.Upload(iter([])),
        anext(aiter(stub.Watch(pb.WatchRequest()))),
        anext(aiter(stub.Download(pb.DownloadRequest()))),
        health.Check(health_pb2.HealthCheckRequest()),
    ]
    for call in calls:
        assert isinstance(await refusal_of(call), ForbiddenError)
    await channel.close()  # type: ignore[call-arg]


async def test_agent_cannot_enroll_others(served: Served) -> None:
    identity = await served.enroll("edge-1")
    async with stub_with(served.address, identity.material) as stub:
        request = pb.EnrollRequest(request=tls.make_request(tls.new_key(), "edge-2"))
        assert isinstance(await refusal_of(stub.Enroll(request)), ForbiddenError)
        request = pb.RenewRequest(request=tls.make_request(tls.new_key(), "edge-1"))
        assert isinstance(await refusal_of(stub.Renew(request)), InvalidError)


async def test_agent_touches_only_its_own_uploads(served: Served, tmp_path: Path) -> None:
    owner, thief = await served.enroll("owner"), await served.enroll("thief")
    path, blob = shard(tmp_path)
    async with member(served, owner) as client, member(served, thief) as other:
        await client.upload(path, blob, "data", lambda *_: None)
        query = pb.QueryUploadRequest(digest=blob.digest, kind=pb.BLOB_KIND_DATA)
        named = ((rpc.AGENT_ID_KEY, "owner"),)
        reply = await other._stub.QueryUpload(query, metadata=named)
        assert (reply.received_bytes, reply.complete) == (0, False)
        contribution = pb.ContributeRequest(round=1, weights_digest=blob.digest, num_examples=1)
        refused = await refusal_of(other._stub.Contribute(contribution, metadata=named))
        assert refused.reason is Reason.MISSING_BLOB
        with pytest.raises(NotFoundError):
            await other.download(blob, tmp_path / "stolen", lambda *_: None)


async def test_agent_of_another_ca_does_not_pass_the_handshake(served: Served, tmp_path: Path) -> None:
    identity = await served.enroll("edge-1")
    with closing(Authority(tmp_path / "other")) as other:
        token = tls.JoinToken.parse(other.create_token(1, HOUR))
        key = tls.new_key()
        certificate = other.enroll(token.token_id, tls.make_request(key, "edge-1"))
    forged = identity.material._replace(key=tls.pem(key), certificate=certificate)
    async with stub_with(served.address, forged) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Join(JOIN)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.trailing_metadata() in (None, grpc.aio.Metadata())


async def test_nobody_passes_without_a_certificate(served: Served) -> None:
    roots = served.authority.ca_certificate
    name = [("grpc.ssl_target_name_override", tls.SERVER_NAME)]
    credentials = grpc.ssl_channel_credentials(roots)
    async with grpc.aio.secure_channel(served.address, credentials, options=name) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pb_grpc.ECAvgStub(channel).Join(JOIN)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_leaf_signed_by_an_agent_is_worth_nothing(served: Served) -> None:
    """Its key must not make it an authority."""
    identity = await served.enroll("edge-1")
    key, own = tls.new_key(), tls.read_certificates(served.folder / "edge-1/tls/identity.pem")[0]
    agent_key = tls.read_key(served.folder / "edge-1/tls/key.pem")
    leaf = tls.make_agent_certificate(own, agent_key, key.public_key(), "edge-2", own.not_valid_before_utc)
    forged = tls.TlsMaterial(tls.pem(key), tls.pem(leaf) + tls.pem(own), identity.material.roots)
    async with stub_with(served.address, forged) as stub:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Join(JOIN)
    with pytest.raises(UnauthenticatedError):
        served.authority.holder(forged.certificate)


async def test_agent_cannot_pose_as_the_server(served: Served) -> None:
    """Not even one whose id is the server's name."""
    await served.enroll(tls.SERVER_NAME)
    identity = await served.enroll("edge-1")
    material = find(served.folder / tls.SERVER_NAME / "tls").material  # type: ignore[union-attr]
    impostor = grpc.aio.server()
    pb_grpc.add_ECAvgServicer_to_server(pb_grpc.ECAvgServicer(), impostor)
    port = impostor.add_secure_port("127.0.0.1:0", rpc.server_credentials(lambda: material))
    await impostor.start()
    async with stub_with(f"127.0.0.1:{port}", identity.material) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
            await stub.Join(JOIN)
    await impostor.stop(0)


# ---------------------------------------------------------------------- revocation


async def test_revoked_agent_is_cut_off_at_once(served: Served, tmp_path: Path) -> None:
    """Its open Watch, its upload that is under way, and whatever it calls from then on; nobody else."""
    identity, other = await served.enroll("edge-1"), await served.enroll("edge-2")
    path, blob = shard(tmp_path)
    header = pb.UploadHeader(digest=blob.digest, kind=pb.BLOB_KIND_DATA, size_bytes=blob.size_bytes)
    async with member(served, identity) as client, member(served, other) as neighbour:
        watched, watching = (asyncio.ensure_future(drain(each.watch())) for each in (client, neighbour))
        await until(lambda: served.here.coordinator._presence.here == {"edge-1", "edge-2"})
        uploading = client._stub.Upload()
        await uploading.write(pb.UploadRequest(header=header))
        await uploading.write(pb.UploadRequest(chunk=path.read_bytes()[:1000]))

        # As `cloud-server agents revoke` does it, from another process.
        with closing(Authority(served.folder / "server/tls")) as elsewhere:
            elsewhere.revoke_agent("edge-1")
        with pytest.raises(ForbiddenError, match="agent edge-1 has been revoked"):
            await client.join()
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(ForbiddenError, match="agent edge-1 has been revoked"):
                await watched
            assert (await refusal_of(uploading)).reason is Reason.REVOKED
        assert not watching.done()
        watching.cancel()
        await asyncio.wait([watching])
        await neighbour.join()
    async with member(served, identity, join=False) as client:  # nor over a new connection
        with pytest.raises(ForbiddenError, match="revoked"):
            await client.join()


async def test_revoked_agent_comes_back_with_a_newer_token_only(served: Served) -> None:
    token = served.token(uses=10)
    await served.enroll("edge-1", token)
    served.authority.revoke_agent("edge-1")
    with pytest.raises(ForbiddenError, match="revoked"):
        await served.enroll("edge-1", token)
    async with member(served, await served.enroll("edge-1")):
        pass


@pytest.mark.parametrize("days", [-1000, 1000])
def test_revocation_and_token_are_ordered_whatever_the_clock_says(tmp_path: Path, days: float) -> None:
    """The clock is set between the two: behind, an old token must not do; ahead, a new one must."""
    clock, key = Clock(), tls.new_key()
    request = tls.make_request(key, "edge-1")
    with closing(Authority(tmp_path / "tls", clock)) as authority:
        old, *_ = (tls.JoinToken.parse(authority.create_token(9, HOUR)).token_id for _ in range(2))
        authority.enroll(old, request)
        clock.ahead_seconds = days * 24 * HOUR
        authority.revoke_agent("edge-1")
        clock.ahead_seconds = 0
        with pytest.raises(ForbiddenError, match="agent edge-1 has been revoked"):
            authority.enroll(old, request)
        new = tls.JoinToken.parse(authority.create_token(9, HOUR)).token_id
        authority.revoke_agent("edge-1")
        authority.enroll(new, request)


async def test_token_made_while_the_clock_was_ahead_does_not_count_after_it_is_set(served: Served) -> None:
    """It would let devices in for years."""
    served.clock.ahead_seconds = 10 * 365 * 24 * HOUR
    token = served.token(uses=2)
    await served.enroll("edge-1", token)
    served.clock.ahead_seconds = 0
    with pytest.raises(UsageError, match="does not take this join token"):
        await served.enroll("edge-2", token)
    with pytest.raises(ForbiddenError, match="expired"):
        served.authority.enroll(token.token_id, tls.make_request(tls.new_key(), "edge-2"))
    await served.enroll("edge-2")


def test_what_does_not_exist_cannot_be_revoked(tmp_path: Path) -> None:
    with closing(Authority(tmp_path / "tls")) as authority:
        with pytest.raises(NotFoundError, match="cloud-server agents list"):
            authority.revoke_agent("nobody")
        with pytest.raises(NotFoundError, match="cloud-server token list"):
            authority.revoke_token("nothing")


# ---------------------------------------------------------------------- renewal


async def test_agent_renews_its_certificate_and_the_upload_under_way_goes_on(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "AGENT_LIFETIME", timedelta(seconds=55))
    monkeypatch.setattr(Identity, "renews_at", property(lambda _: tls.BEGINNING))
    identity = await served.enroll("edge-1")
    first, ends_at = identity.material.certificate, identity.ends_at
    path, blob = shard(tmp_path)
    header = pb.UploadHeader(digest=blob.digest, kind=pb.BLOB_KIND_DATA, size_bytes=blob.size_bytes)
    async with member(served, identity) as client:
        watch = client.watch()
        await anext(watch)
        going_on = asyncio.ensure_future(anext(watch))
        async with client._line() as stub:  # an upload that has begun, and that goes on when we say so
            uploading = stub.Upload()
            await uploading.write(pb.UploadRequest(header=header))
            content = path.read_bytes()
            await uploading.write(pb.UploadRequest(chunk=content[:1000]))
            monkeypatch.setattr(tls, "AGENT_LIFETIME", timedelta(days=90))
            renewing = asyncio.create_task(client.keep_identity())
            await until(lambda: identity.material.certificate != first)
            await until(lambda: client._stub is not stub)
            assert (await going_on).phase == "collecting"  # Watch has gone over to the new connection
            await uploading.write(pb.UploadRequest(chunk=content[1000:]))
            await uploading.done_writing()
            assert (await uploading).received_bytes == blob.size_bytes
        assert list(client._num_calls) == [client._channel]  # the old connection is closed
        served.clock.ahead_seconds = 60  # the first certificate has ended
        await client.join()
        await watch.aclose()
        renewing.cancel()
    assert ends_at < identity.ends_at == find(served.folder / "edge-1/tls").ends_at  # type: ignore[union-attr]


async def test_certificate_that_has_ended_is_not_taken(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(tls, "AGENT_LIFETIME", timedelta(seconds=30))
    identity = await served.enroll("edge-1")
    async with member(served, identity) as client:
        served.clock.ahead_seconds = 60
        with pytest.raises(UnauthenticatedError, match=r"has ended \(on .*\): enroll again"):
            await client.join()


# ---------------------------------------------------------------------- plaintext


async def troubles_of(client: CloudClient, troubles: list[str]) -> str:
    joining = asyncio.create_task(client.join())
    await until(lambda: troubles)
    joining.cancel()
    await client.close()
    return troubles[0]


async def test_tls_and_plaintext_tell_each_other_apart(served: Served, tmp_path: Path) -> None:
    identity = await served.enroll("edge-1")
    async with serving(tmp_path / "plain", is_insecure=True) as plain:
        troubles: list[str] = []
        client = CloudClient(plain.address, identity, AgentMetrics(), troubles.append)
        assert (await troubles_of(client, troubles)).startswith(
            "the server speaks plaintext and this agent TLS: start the server without --insecure"
        )
        enrolment = Enrolment(tmp_path / "new/tls", "new", served.token(), plain.address)
        with pytest.raises(UsageError, match="the server speaks plaintext and this agent TLS"):
            await enroll(enrolment, plain.address, lambda _: None)
        async with member(plain, "edge-1") as client:  # by its word
            refused = await refusal_of(client._stub.Renew(pb.RenewRequest(), metadata=client._metadata))
            assert str(refused).startswith("this server speaks plaintext")
    troubles = []
    client = CloudClient(served.address, "edge-1", AgentMetrics(), troubles.append)
    assert (await troubles_of(client, troubles)).startswith("the server speaks TLS and this agent plaintext")


async def test_another_server_is_told_from_ours(served: Served, tmp_path: Path) -> None:
    identity = await served.enroll("edge-1")
    async with serving(tmp_path / "other") as other:
        troubles: list[str] = []
        client = CloudClient(other.address, identity, AgentMetrics(), troubles.append)
        said = await troubles_of(client, troubles)
    assert said.startswith("the server is not the one that this agent enrolled with")


@pytest.mark.parametrize("agent_id", ["", "../etc", "a b", "x" * 65, '"><script>'])
async def test_agent_ids_in_metadata_are_restricted(tmp_path: Path, agent_id: str) -> None:
    async with serving(tmp_path / "plain", is_insecure=True) as plain, stub_with(plain.address, None) as stub:
        refused = await refusal_of(stub.Join(JOIN, metadata=((rpc.AGENT_ID_KEY, agent_id),)))
        assert refused.reason is Reason.MALFORMED_REQUEST


# ---------------------------------------------------------------------- the commands


async def run(*command: object, **env: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *map(str, command)),
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_commands_let_in_and_keep_out_while_the_server_runs(served: Served, tmp_path: Path) -> None:
    where = ("--state-dir", served.folder / "server")
    code, token, _ = await run(
        "ecavg.cloud_server", "token", "create", "--uses", 10, "--ttl-seconds", 3600, *where
    )
    assert (code, len(token.split())) == (0, 1)
    agent = ("--server", served.address, "--state-dir", tmp_path / "device", "--agent-id", "edge-7")
    code, said, _ = await run("ecavg.edge_agent", "enroll", *agent, "--token", token.strip())
    assert (code, said[:19]) == (0, "enrolled as edge-7,")
    _, listed, _ = await run("ecavg.cloud_server", "token", "list", *where)
    assert "1 of 10" in listed
    assert "live" in listed
    token_id = tls.JoinToken.parse(token).token_id
    _, listed, _ = await run("ecavg.cloud_server", "agents", "list", *where)
    assert "edge-7" in listed
    code, said, _ = await run("ecavg.cloud_server", "agents", "revoke", "edge-7", *where)
    assert f"cloud-server token revoke {token_id}" in said  # its bearer could enroll under another id
    assert (await run("ecavg.cloud_server", "token", "revoke", token_id, *where))[0] == 0
    identity = find(tmp_path / "device/tls")
    assert identity
    async with member(served, identity, join=False) as client:
        with pytest.raises(ForbiddenError):
            await client.join()
    with pytest.raises(UsageError):
        await served.enroll("edge-8", tls.JoinToken.parse(token))
    code, _, error = await run("ecavg.cloud_server", "agents", "revoke", "nobody", *where)
    assert (code, len(error.splitlines())) == (2, 1)


async def test_agent_that_has_not_enrolled_says_what_to_do(tmp_path: Path) -> None:
    code, _, error = await run(
        "ecavg.edge_agent", "--server", "127.0.0.1:1", "--state-dir", tmp_path / "device"
    )
    assert code == 2
    assert error == (
        "edge-agent: this agent has not enrolled: run `edge-agent enroll --server 127.0.0.1:1"
        f" --state-dir {tmp_path / 'device'} --token TOKEN`, with a token of `cloud-server token create`\n"
    )


@pytest.mark.parametrize("point", [Point.AGENT_KEY_WRITTEN, Point.AGENT_ENROLLED])
async def test_enrolment_killed_half_way_is_done_again_at_no_cost(
    served: Served, tmp_path: Path, point: Point
) -> None:
    token = served.token(uses=1)
    command = ("ecavg.edge_agent", "enroll", "--server", served.address, "--agent-id", "edge-1")
    command += ("--state-dir", tmp_path / "device", "--token", str(token))
    killed, _, _ = await run(*command, ECAVG_CRASH_AT=f"{point.value}:1:{tmp_path / 'died'}")
    assert killed == -signal.SIGKILL
    assert find(tmp_path / "device/tls") is None
    assert (await run(*command))[0] == 0
    assert [row.num_used for row in served.authority.tokens()] == [1]


async def test_ca_half_made_is_completed(tmp_path: Path) -> None:
    command = ("ecavg.cloud_server", "token", "create", "--state-dir", tmp_path / "state")
    env = {"ECAVG_CRASH_AT": f"{Point.SERVER_CA_KEY_WRITTEN.value}:1:{tmp_path / 'died'}"}
    assert (await run(*command, **env))[0] == -signal.SIGKILL
    folder = tmp_path / "state/tls"
    assert not (folder / "ca.pem").exists()
    key = (folder / "ca.key").read_bytes()
    assert (await run(*command))[0] == 0
    assert (folder / "ca.key").read_bytes() == key
    fingerprints = set()
    for name in ("server.key", "server.pem"):  # of what is missing each is made again, for the same CA
        (folder / name).unlink()
        with closing(Authority(folder)) as authority:
            fingerprints.add(authority.fingerprint)
            server = tls.load_certificate(authority.material().certificate)
            assert tls.is_issued_by(server, tls.load_certificate(authority.ca_certificate))
    assert len(fingerprints) == 1


@pytest.mark.parametrize("days", [-366, 366])
def test_ca_that_has_ended_or_is_not_valid_yet_is_named_with_its_dates(tmp_path: Path, days: float) -> None:
    """Also when the server's certificate is there already, and when the clock is set afterwards."""
    folder, clock, key = tmp_path / "tls", Clock(), tls.new_key()
    tls.make_private_folder(folder)
    year = (datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=365))
    mine = tls._sign("mine", key.public_key(), "mine", key, year, *tls._authority_extensions())
    (folder / "ca.pem").write_bytes(tls.pem(mine))
    (folder / "ca.key").write_bytes(tls.pem(key))
    Authority(folder, clock).close()
    clock.ahead_seconds = days * 24 * HOUR
    with pytest.raises(
        CaNotValidError, match=rf"ca\.pem is valid from {year[0]:%Y-%m-%d} until {year[1]:%F}"
    ):
        Authority(folder, clock)
    clock.ahead_seconds = 0
    with closing(Authority(folder, clock)) as authority:
        server = tls.load_certificate(authority.material().certificate)
    # It ends with the CA, because TLS refuses a certificate whose issuer has ended.
    assert server.not_valid_after_utc == mine.not_valid_after_utc


def test_server_certificate_that_ends_before_its_ca_is_made_anew(tmp_path: Path) -> None:
    with closing(Authority(tmp_path / "tls")) as authority:
        ca, ca_key = authority._ca, authority._ca_key
        key = tls.read_key(tmp_path / "tls/server.key").public_key()
        name = tls._leaf_extensions(ExtendedKeyUsageOID.SERVER_AUTH, DNSName(tls.SERVER_NAME))
        year = (datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=365))
        short = tls._sign(tls.SERVER_NAME, key, ca, ca_key, year, *name)
    tls.write_private(tmp_path / "tls/server.pem", tls.pem(short))
    with closing(Authority(tmp_path / "tls")) as authority:
        server = tls.load_certificate(authority.material().certificate)
    assert tls.validity(server) == (tls.BEGINNING, tls.NEVER)


def test_ca_of_ones_own_is_used(tmp_path: Path) -> None:
    tls.make_private_folder(tmp_path / "tls")
    key = tls.new_key()
    mine = tls.make_ca(key)
    (tmp_path / "tls/ca.pem").write_bytes(tls.pem(mine))
    with pytest.raises(UsageError, match=r"ca\.key is not: put the CA's key there"):
        Authority(tmp_path / "tls")
    (tmp_path / "tls/ca.key").write_bytes(tls.pem(tls.new_key()))
    with pytest.raises(UsageError, match="is not the key of"):
        Authority(tmp_path / "tls")
    (tmp_path / "tls/ca.key").write_bytes(tls.pem(key))
    with closing(Authority(tmp_path / "tls")) as authority:
        assert authority.ca_certificate == tls.pem(mine)


def test_plaintext_round_is_warned_of_and_its_page_asks_for_the_token(cluster: Cluster) -> None:
    anywhere = ("--host", "0.0.0.0", "--http-host", "0.0.0.0")
    quick = ("--min-agents", 1, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")
    server = cluster.server("--insecure", *anywhere, *quick)
    assert "cloud-server: WARNING: --insecure on 0.0.0.0: everything travels in plaintext" in server.output
    assert not (cluster.state_dir / "tls").exists()
    base = f"http://127.0.0.1:{cluster.http_port}"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{base}/api/status")
    token = (cluster.state_dir / "http-token").read_text("utf-8").strip()
    request = urllib.request.Request(f"{base}/api/status", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as reply:
        assert reply.status == 200
    agent = cluster.agent("edge-1", "--insecure", "--partition", "1/1")
    assert agent.wait() == 0
    assert server.wait() == 0
    assert "WARNING" not in agent.output  # it is on loopback
