"""What the agent's client makes of a server that answers oddly; the server is a stub without a network."""

import hashlib
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from ecavg.common import rpc
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, Reason, UnavailableError, UsageError
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.transfer import Blob
from ecavg.edge_agent import client as client_module
from ecavg.edge_agent.client import CloudClient, UnknownAgentError
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.server_clock import ServerClock

CONTENT = b"abcdefgh"
BLOB = Blob(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace all random pauses by no pause, and return the upper bounds that they were drawn with."""
    seen: list[float] = []

    def uniform(_: float, bound: float) -> float:
        seen.append(bound)
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    return seen


class Stream:
    """One call's messages, which may end in an error."""

    def __init__(self, *messages: Any) -> None:
        self._messages = messages

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self._messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self) -> None: ...


def refusal(code: grpc.StatusCode, reason: Reason | None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((rpc.REASON_KEY, reason.value)) if reason else grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, "refused")  # type: ignore[call-arg]


BROKEN = refusal(grpc.StatusCode.UNAVAILABLE, None)
INTERNAL = refusal(grpc.StatusCode.INTERNAL, Reason.INTERNAL)
UNKNOWN_AGENT = refusal(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_AGENT)


def unary(*answers: Any) -> Callable[..., Any]:
    """Return a call that gives these answers in turn, and the last answer for ever."""
    left = list(answers)

    async def call(*_: Any, **__: Any) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


def streams(*calls: Stream) -> Callable[..., Stream]:
    left: Iterator[Stream] = iter(calls)
    return lambda *_, **__: next(left)


def client_of(**methods: Any) -> CloudClient:
    client = CloudClient("127.0.0.1:1", "agent", AgentMetrics())
    client._stub = SimpleNamespace(**methods)
    return client


def joined(run_json: str) -> pb.JoinReply:
    return pb.JoinReply(run_id="r", run_json=run_json, slot=1, num_partitions=1)


async def test_server_that_fails_inside_is_asked_again(tmp_path: Path) -> None:
    reply = joined(RunConfig().model_dump_json())
    chunk = pb.DownloadReply(chunk=CONTENT)
    client = client_of(
        Join=unary(INTERNAL, INTERNAL, reply),
        Watch=streams(
            Stream(INTERNAL), Stream(pb.WatchEvent(round=7, phase=pb.PHASE_PUBLISHED, run_over=True))
        ),
        Download=streams(Stream(INTERNAL), Stream(chunk)),
    )
    assert (await client.join()).run_id == "r"
    assert [state.round async for state in client.watch()] == [7]
    await client.download(BLOB, tmp_path / "blob", lambda *_: None)
    assert (tmp_path / "blob").read_bytes() == CONTENT


async def test_run_that_this_agent_does_not_understand_is_one_line() -> None:
    run = json.loads(RunConfig().model_dump_json()) | {"of_the_future": 1}
    with pytest.raises(UsageError, match=r"of_the_future: .*: install the same version on both") as error:
        await client_of(Join=unary(joined(json.dumps(run)))).join()
    assert "\n" not in str(error.value)


async def test_agent_that_is_not_known_is_told_so(tmp_path: Path) -> None:
    client = client_of(
        QueryUpload=unary(UNKNOWN_AGENT), Contribute=unary(UNKNOWN_AGENT),
        Watch=streams(Stream(UNKNOWN_AGENT)), Download=streams(Stream(UNKNOWN_AGENT)),
    )  # fmt: skip
    calls = [
        anext(client.watch()),
        client.download(BLOB, tmp_path / "blob", lambda *_: None),
        client.upload(tmp_path / "blob", BLOB, "data", lambda *_: None),
        client.contribute(1, weights=BLOB, shards=[], num_examples=1, score_local=None, initial_weights=None),
    ]
    for call in calls:
        with pytest.raises(UnknownAgentError):
            await call


async def test_damaged_file_of_the_server_is_not_fetched_for_ever(
    tmp_path: Path, bounds: list[float]
) -> None:
    damaged = [Stream(*(pb.DownloadReply(chunk=b"xx") for _ in range(4))) for _ in range(9)]
    client = client_of(Download=streams(*damaged))
    with pytest.raises(InvalidError, match="server's file is damaged") as error:
        await client.download(BLOB, tmp_path / "blob", lambda *_: None)
    assert error.value.reason is Reason.DIGEST_MISMATCH
    # The second attempt brought nothing that the first had not, so the pause after it may be longer.
    assert bounds == pytest.approx([0.2, 0.4])
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_pauses_of_a_download_start_over_where_it_gets_on(tmp_path: Path, bounds: list[float]) -> None:
    client = client_of(
        Download=streams(
            Stream(pb.DownloadReply(chunk=CONTENT[:4]), BROKEN),
            Stream(BROKEN),
            Stream(BROKEN),
            Stream(pb.DownloadReply(chunk=CONTENT[4:6]), BROKEN),
            Stream(pb.DownloadReply(chunk=CONTENT[6:])),
        )
    )
    await client.download(BLOB, tmp_path / "blob", lambda *_: None)
    assert bounds == pytest.approx([0.2, 0.4, 0.8, 0.2])


async def test_watch_that_breaks_at_once_again_and_again_backs_off(bounds: list[float]) -> None:
    event = pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED)
    over = pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED, run_over=True)
    client = client_of(Watch=streams(*[Stream(event, BROKEN), Stream(event)] * 3, Stream(over)))
    assert len([state async for state in client.watch()]) == 7
    assert bounds == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4])


async def test_watch_that_lasted_is_opened_again_soon(
    bounds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "STEADY_SECONDS", -1.0)
    event = pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED)
    over = pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED, run_over=True)
    client = client_of(Watch=streams(*[Stream(event, BROKEN)] * 3, Stream(over)))
    assert len([state async for state in client.watch()]) == 4
    assert bounds == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    ("said", "heard"),
    [(0.0, None), (1.5e9, 1.5e9), (math.inf, None), (math.nan, None), (1e300, None), (-1.0, None)],
)
async def test_time_of_the_next_round_is_heard_if_it_is_one(said: float, heard: float | None) -> None:
    event = pb.WatchEvent(round=1, phase=pb.PHASE_PUBLISHED, run_over=True)
    event.next_round_at, event.num_examples_to_open = said, 500
    (state,) = [state async for state in client_of(Watch=streams(Stream(event))).watch()]
    assert (state.next_round_at, state.num_examples_to_open) == (heard, 500)


async def test_patience_has_an_end_where_it_is_asked_for() -> None:
    client = client_of(Join=unary(BROKEN))
    client.patience_seconds = 0.05
    with pytest.raises(UnavailableError):
        await client.join()


async def test_upload_that_fails_the_server_inside_is_given_up(tmp_path: Path) -> None:
    class Failing:
        async def write(self, _: Any) -> None:
            raise INTERNAL

        def cancel(self) -> None: ...

    (tmp_path / "blob").write_bytes(CONTENT)
    client = client_of(QueryUpload=unary(pb.QueryUploadReply()), Upload=lambda **_: Failing())
    with pytest.raises(InvalidError, match="refused"):
        await client.upload(tmp_path / "blob", BLOB, "data", lambda *_: None)


@pytest.mark.parametrize(
    ("own", "server", "said"),
    [
        (2e9, 2e9 + 299, ""),
        (2e9, 2e9 - 299, ""),
        (2e9, 2e9 + 3000, "this device's clock is 50 minutes behind the server's: set it"),
        (2e9, 2e9 - 3 * 86400, "this device's clock is 3 days ahead of the server's: set it"),
        (1000.0, 2e9, "this device's clock is 63 years behind the server's: set it"),
        (
            2e9,
            1000.0,
            "this device's clock is 63 years ahead of the server's, which is wrong: have that one set",
        ),
    ],
)
async def test_difference_of_the_clocks_is_told_once_and_names_the_wrong_one(
    own: float, server: float, said: str
) -> None:
    told: list[str] = []
    clock = ServerClock(told.append, wall=lambda: own)
    for _ in range(2):
        clock.heard(server)
    assert len(told) == bool(said)
    assert not said or told[0].startswith(said)


async def test_servers_time_is_carried_on_by_the_monotonic_clock_and_senseless_times_are_left_aside() -> None:
    told: list[str] = []
    monotonic = 5.0
    clock = ServerClock(told.append, wall=lambda: 2e9, monotonic=lambda: monotonic)
    clock.heard(2e9)
    for senseless in (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e18):
        clock.heard(senseless)
    monotonic += 7
    assert await clock.now() == 2e9 + 7
    assert told == []
