"""A real `cloud-server` under attack over TLS, and what must hold of it afterwards."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load, save
from tenacity import retry, retry_if_exception, stop_after_delay, wait_fixed

from ecavg.common import rpc
from ecavg.common.errors import Reason, Refusal
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.protocol import SPOKEN
from ecavg.common.tls import SERVER_NAME, TlsMaterial
from tests.processes import Cluster, Command, cluster_in

CALL_SECONDS = 30.0
SETTLING_SECONDS = 60.0  # then a test gives up; none counts on how soon things happen
MAX_GROWTH_BYTES = 64 << 20
IMAGE_SHAPE = (1, 8, 8)  # of the digits, which the server's run is about

# gRPC itself cancels some of the calls that wait in a flood, and an honest agent makes such a call again.
honestly = retry(
    retry=retry_if_exception(
        lambda error: isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.CANCELLED
    ),
    wait=wait_fixed(0.05),
    stop=stop_after_delay(SETTLING_SECONDS),
    reraise=True,
)

KINDS: Mapping[str, Any] = {"weights": pb.BLOB_KIND_WEIGHTS, "data": pb.BLOB_KIND_DATA}


class Agent:
    """An enrolled agent that sends what it likes, over a connection of its own.

    Calls are those of the stub, without retries; `refusal_of` says how one was refused.
    """

    def __init__(self, address: str, agent_id: str, material: TlsMaterial) -> None:
        self.agent_id = agent_id
        self.channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(material.roots, material.key, material.certificate),
            options=[
                *(each for each in rpc.channel_options() if each[0] != "grpc.max_send_message_length"),
                ("grpc.ssl_target_name_override", SERVER_NAME),
                ("grpc.max_send_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.stub: Any = pb_grpc.ECAvgStub(self.channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.channel.close()

    def join(self) -> Any:
        return self.stub.Join(pb.JoinRequest(protocol_version=SPOKEN.newest), timeout=CALL_SECONDS)

    def query(self, digest: str, kind: str) -> tuple[int, bool]:
        request = pb.QueryUploadRequest(digest=digest, kind=KINDS[kind])
        reply = self.stub.QueryUpload(request, timeout=CALL_SECONDS)
        return reply.received_bytes, reply.complete

    def send(self, *messages: Any) -> Any:
        """Make an Upload call with these messages, valid or not, and return the reply."""
        return self.stub.Upload(iter(messages), timeout=CALL_SECONDS)

    def upload(self, content: bytes, kind: str) -> str:
        """Upload a file as a good agent does, from the first byte on; its digest."""
        digest = digest_of(content)
        size = 256 * 1024
        pieces = (content[begin : begin + size] for begin in range(0, len(content), size))
        self.send(header(content, kind), *(pb.UploadRequest(chunk=piece) for piece in pieces))
        return digest

    def event(self) -> Any:
        """Return the first event of a Watch call, which is the state of the run."""
        call = self.stub.Watch(pb.WatchRequest(), timeout=CALL_SECONDS)
        try:
            return next(call)
        finally:
            call.cancel()

    def download(self, digest: str) -> bytes:
        replies = self.stub.Download(pb.DownloadRequest(digest=digest), timeout=CALL_SECONDS)
        return b"".join(reply.chunk for reply in replies)


class Target:
    """The server, and the agents that attack it or only want to be served."""

    def __init__(self, cluster: Cluster, command: Command) -> None:
        self.cluster = cluster
        self.command = command
        self.address = f"127.0.0.1:{cluster.port}"
        self._agents: dict[str, Agent] = {}
        self._numbers = itertools.count()
        self.witness = self.agent("witness")
        self.initial_weights: dict[str, np.ndarray] = load(
            self.witness.download(self.witness.event().initial_weights.digest)
        )
        self.initial_digest: str = self.witness.event().initial_weights.digest

    @property
    def state_dir(self) -> Path:
        return self.cluster.state_dir

    def agent(self, name: str, *, join: bool = True) -> Agent:
        """Return an enrolled agent; the same name returns the same agent and connection."""
        if name not in self._agents:
            self._agents[name] = Agent(self.address, name, self.cluster.enroll(name).material)
            if join:
                self._agents[name].join()
        return self._agents[name]

    def partials(self) -> set[str]:
        """Names of the uploads that the server holds half of."""
        return {path.name for path in (self.state_dir / "partial").iterdir()}

    def resident_bytes(self) -> int:
        """Memory that the serving process (not the trainer) holds now."""
        return self._status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Return the server's peak memory since `unharmed` began."""
        return self._status_bytes("VmHWM")

    def cpu_seconds(self) -> float:
        """Return what the serving process has worked: unlike time, the same on a machine that is busy."""
        fields = Path(f"/proc/{self._pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def unharmed(self, *, num_partials: int = 0, growth_bytes: int = MAX_GROWTH_BYTES) -> Iterator[None]:
        """Whatever the body does, the server serves another agent, in the same process and memory.

        Args:
            num_partials: uploads that the body may leave half done, for their agents to go on with.
            growth_bytes: how far memory may be above that of before, at any moment.
        """
        partials, num_log_bytes = self.partials(), self.command.output_path.stat().st_size
        Path(f"/proc/{self._pid}/clear_refs").write_text("5", "ascii")  # the peak begins anew: proc(5)
        before_bytes = self.resident_bytes()
        yield
        assert self.command.process.poll() is None, self.command.output
        self.serve_another()
        assert self.peak_bytes() - before_bytes <= growth_bytes
        assert len(self.partials() - partials) <= num_partials, self.partials() - partials
        logged = self.command.output_path.read_bytes()[num_log_bytes:]
        assert b"Traceback" not in logged, logged.decode()
        assert b"rpc_failed" not in logged, logged.decode()
        until(lambda: self.resident_bytes() - before_bytes <= growth_bytes)

    @honestly
    def serve_another(self) -> None:
        """Check that an honest agent can join, query, upload a new shard, and watch."""
        witness = self.witness
        witness.join()
        content = shard(4, first_pixel=next(self._numbers))
        assert witness.query(digest_of(content), "data") == (0, False)
        digest = witness.upload(content, "data")
        assert witness.query(digest, "data") == (len(content), True)
        assert witness.event().round == 1

    def close(self) -> None:
        for agent in self._agents.values():
            agent.close()

    @property
    def _pid(self) -> int:
        pid: int = self.command.process.pid
        return pid

    def _status_bytes(self, field: str) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text("ascii")
        return int(status.split(f"{field}:")[1].split()[0]) * 1024


@contextmanager
def target_in(folder: Path, *args: object, env: dict[str, str] | None = None) -> Iterator[Target]:
    """Start a server whose first round stays open.

    Args:
        args: further flags of the server's command line.
    """
    with cluster_in(folder) as cluster:
        command = cluster.server("--min-agents", 100_000, *args, env=env)
        target = Target(cluster, command)
        try:
            target.serve_another()  # what is loaded late is loaded now
            yield target
        finally:
            target.close()


def header(content: bytes, kind: str, /, **changes: Any) -> Any:
    """Return the first message of an honest upload of these bytes, with the changes."""
    fields = {"digest": digest_of(content), "kind": KINDS[kind], "size_bytes": len(content), "offset": 0}
    return pb.UploadRequest(header=pb.UploadHeader(**{**fields, **changes}))


def chunk(content: bytes) -> Any:
    return pb.UploadRequest(chunk=content)


def refusal_of(call: Callable[[], Any]) -> Refusal:
    """How the server refused; every refusal has one of our reasons."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    broken: Any = error.value
    assert rpc.REASON_KEY in dict(broken.trailing_metadata() or ()), f"without a reason: {broken}"
    refusal = rpc.error_from(broken)
    assert refusal.reason is not Reason.INTERNAL, refusal
    return refusal


def shard(num_examples: int, *, first_pixel: int = 0) -> bytes:
    """Return a shard of the run's dataset; another `first_pixel`, below 2^24, gives another shard."""
    images = np.zeros((num_examples, *IMAGE_SHAPE), np.uint8)
    images[0, 0, 0, :3] = list(first_pixel.to_bytes(3, "little"))
    return save({"images": images, "labels": np.arange(num_examples, dtype=np.int64) % 10})


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def until(condition: Callable[[], bool], seconds: float = SETTLING_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)
