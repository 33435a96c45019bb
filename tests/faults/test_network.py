"""What a bad network does to transfers and to Watch: a real server behind a proxy that follows a plan."""

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecavg.cloud_server import servicer
from ecavg.common import rpc
from ecavg.common.run_state import Outcome, RunState
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import CHUNK_BYTES, Blob, blob_of
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.identity import Identity
from ecavg.edge_agent.metrics import AgentMetrics
from tests.faults import impatient_server
from tests.faults.proxy import Action, Fault, Flow, Proxy
from tests.processes import WAIT_SECONDS, Cluster, Command

MIB = 1 << 20
LINK_BYTES_PER_SECOND = 30e6  # less than either end manages, so that little is ever in flight
IN_FLIGHT_BYTES = 2 * MIB  # in socket buffers and HTTP/2's window
OVERHEAD = 1.01  # framing and small calls
BREAKS = (Action.CUT, Action.TRUNCATE)


class ImpatientCluster(Cluster):
    """A cluster of one server whose round stays open and whose time-outs are a second or so."""

    current: Command
    is_insecure = False

    def start(self) -> None:
        flags = ["--insecure"] * self.is_insecure
        self.current = self.server("--min-agents", 1000, "--set", "run.hidden_units=60000", *flags)

    def partial_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.state_dir.glob("partial/*"))

    def is_watching(self, agent_id: str) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/api/status", timeout=30) as reply:
            agents = json.load(reply)["agents"]
        return any(agent["agent_id"] == agent_id and agent["state"] != "away" for agent in agents)

    def _start(self, module: str, *args: object, **options: Any) -> Command:
        return super()._start("tests.faults.impatient_server", *args, **options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImpatientCluster]:
    cluster = ImpatientCluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def plaintext(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImpatientCluster]:
    """Over TLS a flipped bit ends the connection; here nobody but us sees it."""
    cluster = ImpatientCluster(tmp_path_factory.mktemp("plaintext"))
    cluster.is_insecure = True
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents as impatient as the server."""
    monkeypatch.setattr(rpc, "KEEPALIVE_SECONDS", impatient_server.KEEPALIVE_SECONDS)
    monkeypatch.setattr(rpc, "KEEPALIVE_TIMEOUT_SECONDS", impatient_server.KEEPALIVE_TIMEOUT_SECONDS)
    monkeypatch.setattr(rpc, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(rpc, "MAX_PAUSE_SECONDS", 0.2)


class Agent(CloudClient):
    """A client that has joined, and remembers how its transfers went on."""

    def __init__(self, port: int, caller: Identity | str) -> None:
        self.troubles: list[str] = []
        self.done_bytes: list[int] = []
        self.metrics = AgentMetrics()
        super().__init__(f"127.0.0.1:{port}", caller, self.metrics, self.troubles.append)

    def on_bytes(self, done: int, _: int) -> None:
        self.done_bytes.append(done)

    @property
    def resumed_at(self) -> list[int]:
        """Where an attempt went on behind the place that the one before had reached."""
        pairs = zip(self.done_bytes, self.done_bytes[1:], strict=False)
        return [later for earlier, later in pairs if later <= earlier]

    async def state(self) -> RunState:
        watch = self.watch()
        state = await anext(watch)
        await watch.aclose()
        return state


@asynccontextmanager
async def joined(cluster: ImpatientCluster, port: int, name: str) -> AsyncIterator[Agent]:
    agent = Agent(port, name if cluster.is_insecure else cluster.enroll(name))
    try:
        await agent.join()
        yield agent
    finally:
        await agent.close()


def shard(folder: Path, num_bytes: int, seed: int = 0) -> tuple[Path, Blob]:
    num_images = num_bytes // (64 + 8)
    images = np.random.default_rng(seed).integers(0, 256, (num_images, 1, 8, 8), np.uint8)
    path = folder / f"shard-{seed}.safetensors"
    write_shard(path, Shard(images, np.zeros(num_images, np.int64)))
    return path, blob_of(path)


async def until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110  it is another process that changes
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("action", BREAKS)
async def test_upload_resumes_after_each_of_ten_breaks(
    cluster: ImpatientCluster, tmp_path: Path, action: Action
) -> None:
    path, blob = shard(tmp_path, 32 * MIB)
    plan = Flow(*[Fault(action, 3 * MIB)] * 10, bytes_per_second=LINK_BYTES_PER_SECOND)
    async with (
        Proxy(cluster.port, up=plan) as proxy,
        joined(cluster, proxy.port, f"up-{action.name}") as agent,
    ):
        await agent.upload(path, blob, "data", agent.on_bytes)
        assert (proxy.num_connections, plan.faults) == (11, [])
        assert agent.resumed_at == sorted(agent.resumed_at)
        assert plan.num_bytes <= blob.size_bytes * OVERHEAD + 10 * (CHUNK_BYTES + IN_FLIGHT_BYTES)
        await agent.upload(path, blob, "data", agent.on_bytes)  # is there: nothing is sent
        assert agent.done_bytes[-1] == blob.size_bytes


@pytest.mark.parametrize("action", BREAKS)
async def test_download_resumes_after_each_of_five_breaks(
    cluster: ImpatientCluster, tmp_path: Path, action: Action
) -> None:
    plan = Flow(*[Fault(action, 3 * MIB)] * 5, bytes_per_second=LINK_BYTES_PER_SECOND)
    async with (
        Proxy(cluster.port, down=plan) as proxy,
        joined(cluster, proxy.port, f"down-{action.name}") as agent,
    ):
        blob = (await agent.state()).initial_weights
        await agent.download(blob, tmp_path / "model", agent.on_bytes)
        assert blob_of(tmp_path / "model") == blob
        assert (proxy.num_connections, plan.faults) == (6, [])
        assert agent.done_bytes == sorted(agent.done_bytes)  # not one byte is stored twice
        assert plan.num_bytes <= blob.size_bytes * OVERHEAD + 5 * (CHUNK_BYTES + IN_FLIGHT_BYTES)


async def test_slow_but_moving_transfers_outlast_every_time_out(
    cluster: ImpatientCluster, tmp_path: Path
) -> None:
    path, blob = shard(tmp_path, 16 * MIB)
    up, down = Flow(bytes_per_second=4e6), Flow(bytes_per_second=4e6)
    async with Proxy(cluster.port, up=up, down=down) as proxy:
        async with (
            joined(cluster, proxy.port, "slow-up") as sender,
            joined(cluster, proxy.port, "slow-down") as receiver,
        ):
            model = (await receiver.state()).initial_weights

            async def seconds(transfer: Awaitable[None]) -> float:
                started = time.monotonic()
                await transfer
                return time.monotonic() - started

            durations = await asyncio.gather(
                seconds(sender.upload(path, blob, "data", sender.on_bytes)),
                seconds(receiver.download(model, tmp_path / "model", receiver.on_bytes)),
            )
        assert (proxy.num_connections, sender.troubles, receiver.troubles) == (2, [], [])
    patience = impatient_server.KEEPALIVE_SECONDS + impatient_server.KEEPALIVE_TIMEOUT_SECONDS
    assert min(durations) > 1.1 * max(patience, impatient_server.IDLE_SECONDS)


def test_idle_time_out_leaves_a_very_slow_link_the_time_for_a_chunk() -> None:
    assert CHUNK_BYTES / servicer.IDLE_SECONDS < 2500  # bytes per second


async def test_link_with_seconds_of_delay_connects(cluster: ImpatientCluster) -> None:
    up, down = Flow(delay_seconds=0.4), Flow(delay_seconds=0.4)
    async with Proxy(cluster.port, up=up, down=down) as proxy, joined(cluster, proxy.port, "far") as agent:
        assert (proxy.num_connections, agent.troubles) == (1, [])


@pytest.mark.soak
async def test_agent_leaves_a_black_hole_and_resumes(cluster: ImpatientCluster, tmp_path: Path) -> None:
    path, blob = shard(tmp_path, 16 * MIB)
    plan = Flow(Fault(Action.BLACK_HOLE, 8 * MIB), bytes_per_second=LINK_BYTES_PER_SECOND)
    async with Proxy(cluster.port, up=plan) as proxy, joined(cluster, proxy.port, "swallowed") as agent:
        async with asyncio.timeout(WAIT_SECONDS):
            await agent.upload(path, blob, "data", agent.on_bytes)
        assert proxy.num_connections == 2
        assert plan.num_bytes <= blob.size_bytes * OVERHEAD + CHUNK_BYTES + IN_FLIGHT_BYTES


async def test_both_sides_notice_that_an_idle_watch_is_dead(cluster: ImpatientCluster) -> None:
    async with Proxy(cluster.port) as proxy, joined(cluster, proxy.port, "vanished") as agent:
        watch = agent.watch()
        await anext(watch)
        assert await asyncio.to_thread(cluster.is_watching, "vanished")
        proxy.strike(Action.BLACK_HOLE)
        proxy.is_down = True
        again = asyncio.ensure_future(anext(watch))
        await until(lambda: not cluster.is_watching("vanished"))
        await until(lambda: agent.troubles)
        assert not again.done()
        proxy.is_down = False
        async with asyncio.timeout(WAIT_SECONDS):
            assert (await again).phase == "collecting"
        assert agent.troubles[-1] == ""  # told that the server is back
        await watch.aclose()


async def test_idle_watch_is_not_ended_for_too_many_pings(cluster: ImpatientCluster) -> None:
    async with Proxy(cluster.port) as proxy, joined(cluster, proxy.port, "idle") as agent:
        watch = agent.watch()
        await anext(watch)
        silent = asyncio.ensure_future(anext(watch))
        passed_bytes = proxy.up.num_bytes
        ping_bytes = 9 + 8  # and they go on without any data
        await until(lambda: silent.done() or proxy.up.num_bytes - passed_bytes >= 8 * ping_bytes)
        assert not silent.done()
        assert (proxy.num_connections, agent.troubles) == (1, [])
        silent.cancel()


@pytest.mark.parametrize("after_bytes", [MIB, 3 * MIB + 12345])
async def test_flipped_bit_in_an_upload_is_caught_and_cured(
    plaintext: ImpatientCluster, tmp_path: Path, after_bytes: int
) -> None:
    path, blob = shard(tmp_path, 4 * MIB)
    plan = Flow(Fault(Action.FLIP, after_bytes))
    async with (
        Proxy(plaintext.port, up=plan) as proxy,
        joined(plaintext, proxy.port, f"flip-{after_bytes}") as agent,
    ):
        await agent.upload(path, blob, "data", agent.on_bytes)
        assert plan.faults == []
        assert agent.resumed_at == [0]  # nothing of the wrong bytes is kept
        assert blob.size_bytes < plan.num_bytes <= 2 * blob.size_bytes * OVERHEAD
    stored = plaintext.state_dir / "blobs" / blob.digest[:2] / blob.digest
    assert blob_of(stored) == blob


async def test_flipped_bit_in_a_download_is_caught_and_cured(
    plaintext: ImpatientCluster, tmp_path: Path
) -> None:
    plan = Flow(Fault(Action.FLIP, 5 * MIB))
    async with Proxy(plaintext.port, down=plan) as proxy, joined(plaintext, proxy.port, "flip-down") as agent:
        blob = (await agent.state()).initial_weights
        await agent.download(blob, tmp_path / "model", agent.on_bytes)
        assert plan.faults == []
        assert blob_of(tmp_path / "model") == blob
        assert not await asyncio.to_thread(lambda: list(tmp_path.glob(".*")))  # no partial file is left


async def test_flipped_bit_breaks_a_tls_connection_and_the_upload_goes_on(
    cluster: ImpatientCluster, tmp_path: Path
) -> None:
    path, blob = shard(tmp_path, 8 * MIB)
    plan = Flow(Fault(Action.FLIP, 6 * MIB))
    async with Proxy(cluster.port, up=plan) as proxy, joined(cluster, proxy.port, "flip-tls") as agent:
        await agent.upload(path, blob, "data", agent.on_bytes)
        assert (proxy.num_connections, plan.faults) == (2, [])
        assert agent.resumed_at[0] > 0  # what came before the bit was good
    assert blob_of(cluster.state_dir / "blobs" / blob.digest[:2] / blob.digest) == blob


async def test_upload_goes_on_after_the_server_was_killed(cluster: ImpatientCluster, tmp_path: Path) -> None:
    path, blob = shard(tmp_path, 12 * MIB)
    before = cluster.partial_bytes()
    slow = Flow(bytes_per_second=8e6)
    async with Proxy(cluster.port, up=slow) as proxy, joined(cluster, proxy.port, "bereft") as agent:
        uploading = asyncio.ensure_future(agent.upload(path, blob, "data", agent.on_bytes))
        await until(lambda: cluster.partial_bytes() > before + 4 * MIB)
        cluster.current.kill()
        await asyncio.to_thread(cluster.start)
        await uploading
        assert agent.resumed_at[-1] >= 4 * MIB
        limit = blob.size_bytes * OVERHEAD + CHUNK_BYTES + IN_FLIGHT_BYTES
        assert proxy.up.num_bytes <= limit


async def test_server_stops_at_once_and_agents_wait_for_it(cluster: ImpatientCluster, tmp_path: Path) -> None:
    path, blob = shard(tmp_path, 6 * MIB)
    before = cluster.partial_bytes()
    slow = Flow(bytes_per_second=2e5)
    async with Proxy(cluster.port, up=slow) as proxy, joined(cluster, proxy.port, "waiting") as agent:
        watch = agent.watch()
        await anext(watch)
        again = asyncio.ensure_future(anext(watch))
        uploading = asyncio.ensure_future(agent.upload(path, blob, "data", agent.on_bytes))
        await until(lambda: cluster.partial_bytes() > before)
        await asyncio.to_thread(cluster.current.terminate)
        await until(lambda: agent.troubles)
        assert not again.done()
        assert not uploading.done()
        proxy.up = Flow()
        await asyncio.to_thread(cluster.start)
        assert (await again).phase == "collecting"
        await uploading
        assert agent.resumed_at[-1] > 0
        await watch.aclose()


async def test_watch_misses_nothing_while_it_is_cut_off(cluster: ImpatientCluster, tmp_path: Path) -> None:
    async with Proxy(cluster.port) as proxy, joined(cluster, proxy.port, "watcher") as agent:
        watch = agent.watch()
        before = await anext(watch)
        again = asyncio.ensure_future(anext(watch))
        proxy.is_down = True
        proxy.strike(Action.CUT)
        async with joined(cluster, cluster.port, "watcher") as elsewhere:
            await elsewhere.download(before.initial_weights, tmp_path / "model", elsewhere.on_bytes)
            await elsewhere.upload(tmp_path / "model", before.initial_weights, "weights", elsewhere.on_bytes)
            await elsewhere.contribute(
                1, weights=before.initial_weights, shards=[], num_examples=1, score_local=None,
                initial_weights=before.initial_weights.digest,
            )  # fmt: skip
        assert not again.done()
        proxy.is_down = False
        assert (before.outcome, (await again).outcome) == (None, Outcome.ACCEPTED)
        await watch.aclose()


async def test_watch_reconnects_after_every_cut(cluster: ImpatientCluster) -> None:
    async with Proxy(cluster.port) as proxy, joined(cluster, proxy.port, "persistent") as agent:
        watch = agent.watch()
        await anext(watch)
        for num_cuts in range(1, 6):
            proxy.strike(Action.CUT)
            assert (await anext(watch)).round == 1
            assert proxy.num_connections == num_cuts + 1
        await watch.aclose()


async def seconds_to_upload(cluster: ImpatientCluster, port: int, name: str, path: Path, blob: Blob) -> float:
    async with joined(cluster, port, name) as agent:
        started = time.monotonic()
        await agent.upload(path, blob, "data", agent.on_bytes)
        return time.monotonic() - started


async def test_slow_agents_do_not_slow_another_one(cluster: ImpatientCluster, tmp_path: Path) -> None:
    path, blob = shard(tmp_path, 24 * MIB)

    async def least_seconds(name: str) -> float:
        """Return the best of three: the machine may have been busy otherwise."""
        agents = (f"{name}-{number}" for number in range(3))
        return min([await seconds_to_upload(cluster, cluster.port, agent, path, blob) for agent in agents])

    alone = await least_seconds("alone")
    async with Proxy(cluster.port, up=Flow(bytes_per_second=400e3)) as proxy:
        slow = [
            asyncio.ensure_future(seconds_to_upload(cluster, proxy.port, f"slow-{number}", path, blob))
            for number in range(8)
        ]
        await until(lambda: proxy.up.num_bytes > MIB)
        beside = await least_seconds("beside")
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    assert beside < 5 * max(alone, 0.3)


def resident_bytes(process_id: int | str) -> int:
    pages = Path(f"/proc/{process_id}/statm").read_text("utf-8").split()[1]
    return int(pages) * 4096


async def test_memory_does_not_grow_with_the_file(cluster: ImpatientCluster, tmp_path: Path) -> None:
    path, blob = shard(tmp_path, 128 * MIB)
    peaks = {"self": 0, str(cluster.current.process.pid): 0}

    def sample(*_: int) -> None:
        for process_id in peaks:
            peaks[process_id] = max(peaks[process_id], resident_bytes(process_id))

    async with joined(cluster, cluster.port, "large") as agent:
        before = {process_id: resident_bytes(process_id) for process_id in peaks}
        await agent.upload(path, blob, "data", sample)
    assert all(peaks[process_id] - before[process_id] < 48 * MIB for process_id in peaks)


async def test_file_that_vanished_is_an_error_of_its_own(cluster: ImpatientCluster, tmp_path: Path) -> None:
    async with joined(cluster, cluster.port, "forgetful") as agent:
        with pytest.raises(FileNotFoundError):
            await agent.upload(tmp_path / "gone", Blob("f" * 64, 100), "data", agent.on_bytes)
