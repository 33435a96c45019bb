"""A server that was taken over, against a real agent: nothing it says gets out of the agent's folder."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from ecavg.common import rpc
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import InvalidError, RunError, UsageError
from ecavg.common.models import build_model
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.pb import ecavg_pb2_grpc as pb_grpc
from ecavg.common.transfer import MAX_CHUNK_BYTES, Blob
from ecavg.common.weights import write_state_dict
from ecavg.edge_agent.agent import EdgeAgent
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.state import AgentState
from tests.hostile import pickles
from tests.hostile.target import digest_of
from tests.processes import enroll

SECONDS = 30.0
RUN = RunConfig(pretrain=TrainingConfig(epochs=1), hidden_units=8)
ESCAPES = "\x1b]0;owned\x07\x1b[2J\n{'event': 'forged'}\r\u202e"


class Server(pb_grpc.ECAvgServicer):
    """An honest one until a test changes an attribute; its run is over with the first contribution."""

    def __init__(self, weights: bytes) -> None:
        self.joined = pb.JoinReply(run_id="r", run_json=RUN.model_dump_json(), slot=1, num_partitions=10)
        self.weights = weights
        self.event = pb.WatchEvent(
            round=1,
            phase=pb.PHASE_COLLECTING,
            initial_weights=pb.Blob(digest=digest_of(weights), size_bytes=len(weights)),
        )
        self.replies: list[pb.DownloadReply] = []  # in place of the weights
        self.is_endless = False
        self.verdict = pb.ContributeReply(outcome=pb.OUTCOME_ACCEPTED)
        self.is_over = asyncio.Event()

    async def Join(self, _: Any, __: Any) -> pb.JoinReply:
        return self.joined

    async def Watch(self, _: Any, __: Any) -> AsyncIterator[pb.WatchEvent]:
        yield self.event
        await self.is_over.wait()
        yield pb.WatchEvent(round=1, phase=pb.PHASE_FAILED, run_over=True)

    async def QueryUpload(self, _: Any, __: Any) -> pb.QueryUploadReply:
        return pb.QueryUploadReply(complete=True)

    async def Contribute(self, _: Any, __: Any) -> pb.ContributeReply:
        self.is_over.set()
        return self.verdict

    async def Download(self, request: pb.DownloadRequest, _: Any) -> AsyncIterator[pb.DownloadReply]:
        for reply in self.replies or [pb.DownloadReply(chunk=self.weights[request.offset :])]:
            yield reply
        while self.is_endless:
            yield self.replies[-1]


class Display:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "") -> None: ...

    def close(self) -> None: ...


class Device:
    """The agent, and the server that it talks to."""

    def __init__(
        self, folder: Path, server: Server, client: CloudClient, agent: EdgeAgent, display: Display
    ) -> None:
        self.folder = folder
        self.server = server
        self.client = client
        self.display = display
        self._agent = agent

    async def run(self) -> None:
        async with asyncio.timeout(SECONDS):
            await self._agent.run()


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    """Afterwards nothing may lie beside the agent's folder, and no terminal be steered."""
    weights = tmp_path / "initial.safetensors"
    write_state_dict(build_model(RUN, seed=0).state_dict(), weights)
    servicer = Server(weights.read_bytes())
    weights.unlink()
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    pb_grpc.add_ECAvgServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    folder, display = tmp_path / "agent", Display()
    config = AgentConfig(server=f"127.0.0.1:{port}", agent_id="edge-1", state_dir=folder, insecure=True)
    disk = AgentState(folder, "edge-1")
    client = CloudClient(config.server, "edge-1", AgentMetrics())
    agent = EdgeAgent(config, disk, client, AgentMetrics(), display)  # type: ignore[arg-type]
    yield Device(folder, servicer, client, agent, display)
    await client.close()
    await server.stop(0)
    disk.close()
    assert list(tmp_path.iterdir()) == [folder]  # noqa: ASYNC240
    assert not [text for text in display.messages if not text.isprintable()]


async def test_honest_server_is_served(device: Device) -> None:
    await device.run()
    assert any("local accuracy" in text for text in device.display.messages)


# ---------------------------------------------------------------------- the run

OWN = {"dataset": "own", "num_classes": 10}

RUNS: dict[str, str] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "nested deeply": "[" * 500_000,
    "integer of a million digits": '{"seed":' + "9" * 1_000_000 + "}",
    "unknown keys": '{"__class__":"os.system"}',
    "too many hidden units": '{"hidden_units":1000000000}',
    "image of 2^48 values": RUN.model_copy(
        update=OWN | {"image_shape": (65536, 65536, 65536)}
    ).model_dump_json(),
    "image with a negative side": RUN.model_copy(update=OWN | {"image_shape": (-1, -8, 8)}).model_dump_json(),
    "mean that is no number": '{"mean":[NaN]}',
    "code that the device has not allowed as model": '{"model":"os:system"}',
    "code that the device has not allowed as data": (
        '{"dataset":"os:system","num_classes":10,"image_shape":[1,8,8]}'
    ),
    "folder of the device as data": '{"dataset":"/etc","num_classes":10,"image_shape":[1,8,8]}',
    "name that steers the terminal": '{"model":"\\u001b[2J"}',
    "class that steers the terminal": '{"class_names":["\\u001b[2J"]}',
    "key that steers the terminal": '{"\\u001b[2J":1}',
}


@pytest.mark.parametrize("name", RUNS)
async def test_run_that_makes_no_sense_ends_the_agent_with_one_line(device: Device, name: str) -> None:
    device.server.joined.run_json = RUNS[name]
    with pytest.raises(UsageError) as ended:
        await device.run()
    assert len(str(ended.value)) < 1000
    assert str(ended.value).isprintable()


@pytest.mark.parametrize("place", [{"slot": 0}, {"num_partitions": 0}, {"num_partitions": 2**32 - 1}])
async def test_impossible_place_ends_the_agent_with_one_line(device: Device, place: dict[str, int]) -> None:
    for name, value in place.items():
        setattr(device.server.joined, name, value)
    with pytest.raises((RunError, UsageError), match=r"trust it no more|too few for 4294967295 partitions"):
        await device.run()


# ---------------------------------------------------------------------- events


@pytest.mark.parametrize(
    "digest", ["../../../evil", "/tmp/evil", "evil\0", "0" * 64 + "/../evil", "0" * 63, "A" * 64, "０" * 64]
)
@pytest.mark.parametrize("field", ["initial_weights", "initial_encoded", "base_digest", "latest_model"])
async def test_digest_that_is_a_path_opens_no_file(device: Device, digest: str, field: str) -> None:
    blob, event = pb.Blob(digest=digest, size_bytes=100), device.server.event
    if field == "initial_weights":
        event.initial_weights.CopyFrom(blob)
    elif field == "latest_model":
        event.latest_model.CopyFrom(pb.PublishedModel(round=1, weights=blob))
    elif field == "initial_encoded":
        event.initial_encoded.CopyFrom(pb.Encoded(blob=blob))
    else:
        event.initial_encoded.CopyFrom(pb.Encoded(blob=event.initial_weights, base_digest=digest))
    with pytest.raises(RunError, match="the server sent a digest that is none"):
        await device.run()


@pytest.mark.parametrize("field", ["phase", "outcome"])
async def test_state_that_there_is_not_ends_the_agent_with_one_line(device: Device, field: str) -> None:
    setattr(device.server.event, field, 99)
    with pytest.raises(RunError, match=f"the server sent {field.upper()}_99"):
        await device.run()


@pytest.mark.parametrize("size_bytes", [0, 1 << 40, 2**64 - 1])
async def test_no_more_is_downloaded_than_the_runs_model_needs(device: Device, size_bytes: int) -> None:
    device.server.event.initial_weights.size_bytes = size_bytes
    with pytest.raises(RunError, match=f"the server offers weights of {size_bytes} bytes"):
        await device.run()


async def test_texts_do_not_steer_the_terminal(device: Device) -> None:
    device.server.event.failed_round, device.server.event.failure = 1, ESCAPES
    device.server.verdict = pb.ContributeReply(outcome=pb.OUTCOME_REJECTED, message=ESCAPES * 1000)
    await device.run()
    assert [text for text in device.display.messages if "forged" in text]
    assert max(map(len, device.display.messages)) < 1000
    verdict = await device.client.contribute(
        1, weights=Blob("", 0), shards=[], num_examples=1, score_local=None, initial_weights=None
    )
    assert "forged" in verdict.message
    assert verdict.message.isprintable()
    assert len(verdict.message) < 1000


# ---------------------------------------------------------------------- downloads


def offer(device: Device, content: bytes) -> None:
    device.server.weights = content
    blob = pb.Blob(digest=digest_of(content), size_bytes=len(content))
    device.server.event.initial_weights.CopyFrom(blob)


async def test_weights_of_another_model_end_the_agent_with_one_line(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "other"
    write_state_dict({"1.weight": torch.zeros(8, 63)}, path)
    offer(device, path.read_bytes())
    path.unlink()
    with pytest.raises(RunError, match="do not fit the run"):
        await device.run()


async def test_weights_that_are_a_pickle_end_the_agent_with_one_line(device: Device, tmp_path: Path) -> None:
    marker = tmp_path / "somebody-unpickled-this"
    offer(device, pickles.of_torch(marker))
    with pytest.raises(RunError, match="not a usable safetensors file"):
        await device.run()
    assert not marker.exists()


async def test_encoded_weights_that_are_a_pickle_are_fetched_as_they_are(device: Device) -> None:
    encoded = pb.Blob(digest=digest_of(b"\x80\x04."), size_bytes=3)
    device.server.event.initial_encoded.CopyFrom(pb.Encoded(blob=encoded))
    weights = device.server.weights

    async def download(request: pb.DownloadRequest, _: Any) -> AsyncIterator[pb.DownloadReply]:
        whole = b"\x80\x04." if request.digest == encoded.digest else weights
        yield pb.DownloadReply(chunk=whole[request.offset :])

    device.server.Download = download  # type: ignore[method-assign]
    await device.run()
    assert any("local accuracy" in text for text in device.display.messages)


FLOODS: dict[str, Callable[[bytes], pb.DownloadReply]] = {
    "more bytes than were announced": lambda weights: pb.DownloadReply(chunk=weights),
    "one byte more": lambda weights: pb.DownloadReply(chunk=weights + b"x"),
    "chunks over 4 MiB": lambda _: pb.DownloadReply(chunk=bytes(MAX_CHUNK_BYTES + 1)),
    "empty chunks": lambda _: pb.DownloadReply(),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_endless_download_ends_the_agent_with_one_line(device: Device, name: str) -> None:
    device.server.replies = [FLOODS[name](device.server.weights)]
    device.server.is_endless = True
    with pytest.raises((InvalidError, RunError)):
        await device.run()
    left = [path.stat().st_size for path in device.folder.rglob("*.partial")]
    assert sum(left) <= len(device.server.weights)


async def test_bytes_of_another_digest_are_not_fetched_for_ever(device: Device, monkeypatch: Any) -> None:
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.05)
    device.server.replies = [pb.DownloadReply(chunk=bytes(len(device.server.weights)))]
    with pytest.raises(InvalidError, match="the server's file is damaged"):
        await device.run()


# ---------------------------------------------------------------------- certificates


@pytest.mark.parametrize("certificate", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_certificate_that_is_none_changes_nothing(tmp_path: Path, certificate: bytes) -> None:
    identity = enroll(tmp_path / "server", tmp_path / "agent", "edge-1")
    before = identity.material
    with pytest.raises(UsageError, match="something else than a certificate"):
        identity.renew(certificate)
    assert identity.material == before


def test_certificate_of_another_agent_changes_nothing(tmp_path: Path) -> None:
    identity = enroll(tmp_path / "server", tmp_path / "agent", "edge-1")
    other = enroll(tmp_path / "server", tmp_path / "other", "edge-2")
    before = identity.material
    with pytest.raises(UsageError, match="not for this agent's key"):
        identity.renew(other.material.certificate)
    assert identity.material == before
