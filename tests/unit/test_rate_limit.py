"""The rate limit of transfers, by a clock that the test moves."""

from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.rate_limit import RateLimit
from tests.unit.test_agent_client import BLOB, CONTENT, Stream, streams, unary


class Clock:
    """A clock that moves when somebody waits for it."""

    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_bytes_take_the_time_of_the_rate_however_they_are_cut() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.read, clock.sleep)
    for num_bytes in (500, 1500, 1, 2999):
        await limit.let_through(num_bytes)
    assert clock.now == 105


async def test_idle_time_is_made_up_for_by_a_second_at_most() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.read, clock.sleep)
    await limit.let_through(1000)
    clock.now += 60
    await limit.let_through(1000)
    assert clock.now == 161
    await limit.let_through(1000)
    assert clock.now == 162


async def test_time_that_the_transfer_itself_took_counts() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock.read, clock.sleep)
    await limit.let_through(1000)
    clock.now += 0.75
    await limit.let_through(1000)
    assert clock.now == 102


async def test_no_bound_waits_for_nothing() -> None:
    clock = Clock()
    await RateLimit(None, clock.read, clock.sleep).let_through(10**12)
    assert clock.now == 100


class Recorder(RateLimit):
    """A limit that remembers what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    async def let_through(self, num_bytes: int) -> None:
        self.seen.append(num_bytes)


class Upload:
    """The call of an upload that takes everything."""

    async def write(self, _: Any) -> None: ...

    async def done_writing(self) -> None: ...

    def cancel(self) -> None: ...

    def __await__(self) -> Generator[Any, None, pb.UploadReply]:
        return self._reply().__await__()

    async def _reply(self) -> pb.UploadReply:
        return pb.UploadReply()


async def test_each_direction_has_a_limit_of_its_own_for_the_bytes_that_travel(tmp_path: Path) -> None:
    up, down = Recorder(), Recorder()
    client = CloudClient("127.0.0.1:1", "agent", AgentMetrics(), upload_limit=up, download_limit=down)
    chunks = [pb.DownloadReply(chunk=CONTENT[:3]), pb.DownloadReply(chunk=CONTENT[3:])]
    client._stub = SimpleNamespace(
        Download=streams(Stream(*chunks)),
        QueryUpload=unary(pb.QueryUploadReply(received_bytes=2)),
        Upload=lambda **_: Upload(),
    )
    await client.download(BLOB, tmp_path / "blob", lambda *_: None)
    await client.upload(tmp_path / "blob", BLOB, "data", lambda *_: None)
    # What the server had of an upload before does not travel again.
    assert (up.seen, down.seen) == ([len(CONTENT) - 2], [3, len(CONTENT) - 3])
