"""Credentials that are not the caller's, or not any more, at a real server.

More of them, with a clock that the test moves, are in tests/integration/test_identity.py.
"""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from ecavg.cloud_server.door.authority import Authority
from ecavg.common import rpc, tls
from ecavg.common.errors import Reason
from ecavg.common.pb import ecavg_pb2 as pb
from tests.hostile.target import CALL_SECONDS, Agent, Target, chunk, digest_of, header, refusal_of, shard
from tests.processes import ROOT, enroll

CONTENT = shard(5000, first_pixel=1 << 23)


def test_certificate_of_another_ca_does_not_pass(target: Target, tmp_path: Path) -> None:
    stranger = enroll(tmp_path / "tls", tmp_path / "stranger", "attacker")
    ours = target.cluster.enroll("attacker").material
    material = stranger.material._replace(roots=ours.roots)
    with closing(Agent(target.address, "attacker", material)) as agent:
        with pytest.raises(grpc.RpcError) as refused:
            agent.join()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_certificate_with_another_key_does_not_pass(target: Target) -> None:
    """Certificates travel in the open; the key to one does not."""
    material = target.cluster.enroll("witness").material
    other = target.cluster.enroll("attacker").material
    agent = Agent(target.address, "witness", material._replace(key=other.key))
    with closing(agent), pytest.raises(grpc.RpcError):
        agent.join()


def test_metadata_make_nobody_somebody_else(target: Target, attacker: Agent) -> None:
    digest = target.witness.upload(shard(7, first_pixel=(1 << 23) + 1), "data")
    request = pb.QueryUploadRequest(digest=digest, kind=pb.BLOB_KIND_DATA)
    for name in ("witness", "../witness", ""):
        reply = attacker.stub.QueryUpload(request, metadata=((rpc.AGENT_ID_KEY, name),), timeout=CALL_SECONDS)
        assert (reply.received_bytes, reply.complete) == (0, False)


def test_used_token_is_no_credential_any_more(target: Target, tmp_path: Path) -> None:
    """Replayed: by its holder, for another device, for calls that it was never for."""
    with closing(Authority(target.state_dir / "tls")) as authority:
        token = tls.JoinToken.parse(authority.create_token(1, 3600))
        roots = authority.ca_certificate
    key = tls.new_key()
    material = tls.TlsMaterial(tls.pem(key), tls.pem(token.leaf(key)), roots)
    with closing(Agent(target.address, "bearer", material)) as bearer:
        request = pb.EnrollRequest(request=tls.make_request(key, "replayed-1"))
        bearer.stub.Enroll(request, timeout=CALL_SECONDS)
        bearer.stub.Enroll(request, timeout=CALL_SECONDS)  # the same key again: an answer may be lost
        other = pb.EnrollRequest(request=tls.make_request(tls.new_key(), "replayed-2"))
        assert refusal_of(lambda: bearer.stub.Enroll(other, timeout=CALL_SECONDS)).reason is Reason.TOKEN
        assert refusal_of(bearer.join).reason is Reason.TOKEN
        assert refusal_of(lambda: bearer.query(digest_of(CONTENT), "data")).reason is Reason.TOKEN


def test_agent_that_is_revoked_in_mid_upload_is_cut_off(server: Target) -> None:
    """By the command, as another process; what it had sent is nobody's."""
    agent = server.agent("revoked")
    sent, ended = threading.Event(), threading.Event()

    def messages() -> Iterator[Any]:
        yield header(CONTENT, "data")
        yield chunk(CONTENT[: len(CONTENT) // 2])
        sent.set()
        ended.wait(30)

    with server.unharmed(num_partials=1):
        uploading = agent.stub.Upload.future(messages(), timeout=30)
        uploading.add_done_callback(lambda _: ended.set())
        assert sent.wait(CALL_SECONDS)
        command = ("ecavg.cloud_server", "agents", "revoke", "revoked", "--state-dir", str(server.state_dir))
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
        assert refusal_of(uploading.result).reason is Reason.REVOKED
        assert refusal_of(agent.join).reason is Reason.REVOKED
    assert not (server.state_dir / "blobs" / digest_of(CONTENT)[:2] / digest_of(CONTENT)).exists()
