"""The endpoints of the status page, with a real store: files, events, history, reports and models."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.cloud_server.jobs import Progress, round_job
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.showing import feed as feeds
from ecavg.cloud_server.showing import history as histories
from ecavg.cloud_server.showing import page
from ecavg.cloud_server.showing.feed import Feed, change
from ecavg.cloud_server.showing.history import History, thinned
from ecavg.cloud_server.showing.traffic import Traffic
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import retention
from ecavg.common.endpoints import make_app, serve_http
from ecavg.common.errors import StorageError
from ecavg.common.metrics import make_registry
from ecavg.common.run_state import Outcome
from tests.unit.states import AGENT, model_of, run_rounds
from tests.unit.test_reports import RESULT

TOKEN = "correct horse battery"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        yield store


@asynccontextmanager
async def served(
    store: Store, feed: Feed | None = None, token: str | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    async def read() -> dict[str, Any]:
        return {"phase": "starting"}

    more = page.endpoints(store, feed or Feed(read))
    app = make_app(make_registry(), ready=lambda: True, status=read, more=more, token=token)
    server = await serve_http(app, host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client
    await server.stop()


# The files


async def test_page_may_load_the_servers_own_files_and_nothing_else(store: Store) -> None:
    async with served(store) as client:
        reply = await client.get("/")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(
            part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";")
        )
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        for name in re.findall(r'(?:src|href)="([^":]+)"', reply.text):
            assert (await client.get(f"/{name}")).status_code == 200
        module = await client.get("/agents.js")
        assert module.headers["content-type"] == "text/javascript; charset=utf-8"
        assert module.headers["x-content-type-options"] == "nosniff"


def test_page_asks_no_other_server_and_turns_no_data_into_markup() -> None:
    files = [
        file for file in resources.files("ecavg.cloud_server").joinpath("web").iterdir() if not file.is_dir()
    ]
    assert {file.name for file in files} >= {"index.html", "style.css", "main.js"}
    for file in files:
        text = file.read_text("utf-8")
        assert set(re.findall(r"https?:[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        if file.name == "index.html":
            # The page's policy would block them.
            assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=", text)


async def test_everything_of_the_page_asks_for_the_token(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 1)
    paths = ("/", "/main.js", "/uplot/uPlot.iife.min.js", "/api/history", "/api/events")
    parts = [f"/api/rounds/1/{name}" for name in ("loss", "report.json", "model.safetensors")]
    async with served(store, token=TOKEN) as client:
        for path in (*paths, *parts):
            assert (await client.get(path)).status_code == 401
        for path in (*paths[:-1], *parts):
            assert (await client.get(path, auth=("anyone", TOKEN))).status_code == 200


# Reports and models


async def test_report_and_model_of_a_past_round_are_sent(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 2)
    async with served(store) as client:
        report = await client.get("/api/rounds/1/report.json")
        assert report.json() == json.loads((tmp_path / "rounds/0001/report.json").read_text())
        model = await client.get("/api/rounds/2/model.safetensors")
    assert model.content == model_of(2)
    assert 'filename="round-0002-model.safetensors"' in model.headers["content-disposition"]
    assert model.headers["cache-control"] == "no-store"


async def test_rest_of_a_model_is_sent_where_there_is_one(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 2)
    store.state_dir.rest(2).write_bytes(b"what does not travel")
    async with served(store) as client:
        rest = await client.get("/api/rounds/2/rest.safetensors")
        none = await client.get("/api/rounds/1/rest.safetensors")
    assert rest.content == b"what does not travel"
    assert 'filename="round-0002-rest.safetensors"' in rest.headers["content-disposition"]
    assert (none.status_code, none.text) == (404, "round 1 has no such file: all of its model travels\n")


async def test_model_that_was_removed_is_gone_and_its_report_is_not(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 3)
    retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1e9, now=100.0)
    async with served(store) as client:
        gone = await client.get("/api/rounds/1/model.safetensors")
        assert (gone.status_code, "was removed" in gone.text) == (410, True)
        assert (await client.get("/api/rounds/1/report.json")).status_code == 200
        assert (await client.get("/api/rounds/3/model.safetensors")).status_code == 200


@pytest.mark.parametrize("number", ["4", "7", "9" * 5000, "-1", "²"])
async def test_report_of_a_round_that_is_not_over_or_not_there_is_not_found(
    number: str, store: Store, tmp_path: Path
) -> None:
    run_rounds(store, tmp_path, 3)
    async with served(store) as client:
        assert (await client.get(f"/api/rounds/{number}/report.json")).status_code == 404


# The history


def report_of(agent_id: str, after: float, adapted: float | None = None) -> ReportRow:
    return ReportRow(agent_id, None, None, after, 10, True, "", 5.0, adapted)


def contribute(store: Store, number: int, agent_id: str, accuracy: float) -> None:
    store.join(agent_id, 0.5)
    contribution = Contribution(agent_id, "", (), 10, score_local=accuracy)
    store.record_contribution(number, Decision(agent_id, Outcome.ACCEPTED, 1.0, contribution))


def test_history_has_the_recorded_figures_of_each_round(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 2)
    contribute(store, 2, "edge-2", 0.5)
    store.record_report(2, report_of(AGENT, 0.6))
    store.record_report(2, report_of("edge-2", 0.2, adapted=0.8))
    round_job(store.state_dir, 2).write_result(RESULT)
    metrics = ServerMetrics()
    metrics.count_received("weights", 1000)
    metrics.count_sent("model", 10)
    traffic = Traffic(store, metrics)
    traffic.record(2)
    metrics.count_sent("model", 90)
    traffic.record(2)

    history = History(store).read()
    assert (history["first"], history["last"], history["every"]) == (1, 2, 1)
    first, second = history["rounds"]
    assert (first["received_bytes"], first["after"], first["average"]) == (None, None, 0.8)
    assert second == {
        "round": 2,
        "outcome": "published",
        "num_contributions": 2,
        "local": {"low": 0.5, "mean": pytest.approx(0.7), "high": 0.9},
        "after": {"low": 0.6, "mean": pytest.approx(0.7), "high": 0.8},
        "average": RESULT.candidates["average"],
        "start": 0.95,
        "fine_tuned": 0.97,
        "fine_tuned_average": None,
        "published": 0.97,
        "seconds": {"collecting": pytest.approx(0.9)},
        "received_bytes": 1000,
        "sent_bytes": 100,
    }


def test_history_before_the_first_round_is_over_is_empty(store: Store, tmp_path: Path) -> None:
    assert History(store).read() == {"first": None, "last": None, "every": 1, "rounds": []}
    run_rounds(store, tmp_path, 0)
    assert History(store).read()["rounds"] == []


def test_long_history_is_thinned_and_any_part_of_it_can_be_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histories, "MAX_POINTS", 3)
    run_rounds(store, tmp_path, 7)
    history = History(store)

    def numbers(**part: int) -> list[int]:
        return [each["round"] for each in history.read(**part)["rounds"]]

    assert (numbers(), history.read()["every"]) == ([1, 4, 7], 3)
    assert numbers(first=2, last=4) == [2, 3, 4]
    assert numbers(first=-5, last=2) == [1, 2]
    assert numbers(first=6, last=10**30) == [6, 7]
    assert numbers(first=9) == []


async def test_history_takes_numbers_of_rounds_only(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 3)
    async with served(store) as client:
        part = await client.get("/api/history", params={"first": 2, "last": 2})
        assert [each["round"] for each in part.json()["rounds"]] == [2]
        assert (await client.get("/api/history", params={"first": "x"})).status_code == 400


async def test_loss_of_a_fine_tune_is_read_while_it_runs(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 1)
    directory = round_job(store.state_dir, 1)
    for done, loss in ((1, 2.5), (2, None)):
        directory.append_progress(Progress(phase="aggregating", done=1, total=1))
        directory.append_progress(Progress(phase="fine_tuning", done=done, total=5, loss=loss))
    async with served(store) as client:
        assert (await client.get("/api/rounds/1/loss")).json() == {"points": [[1, 2.5], [2, None]]}
        assert (await client.get("/api/rounds/7/loss")).json() == {"points": []}


@pytest.mark.parametrize(
    ("length", "most", "left"), [(0, 3, []), (3, 3, [0, 1, 2]), (4, 3, [1, 3]), (7, 3, [0, 3, 6])]
)
def test_points_are_thinned_evenly_and_the_last_stays(length: int, most: int, left: list[int]) -> None:
    assert thinned(range(length), most) == left


def test_bytes_that_could_not_be_recorded_are_recorded_the_next_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_rounds(store, tmp_path, 1)
    metrics = ServerMetrics()
    traffic = Traffic(store, metrics)
    metrics.count_received("data", 7)
    with monkeypatch.context() as full:

        def transaction(_: Store) -> None:
            raise StorageError("the disk is full")

        full.setattr(Store, "transaction", transaction)
        traffic.record_if_possible(1)
    traffic.record_if_possible(1)
    (figures,) = History(store).read()["rounds"]
    assert figures["received_bytes"] == 7


# The events


def agent(agent_id: str, **more: Any) -> dict[str, Any]:
    return {"agent_id": agent_id, "state": "watching", **more}


def test_event_has_what_has_changed_and_the_first_has_everything() -> None:
    before = {"phase": "collecting", "waiting": None, "agents": [agent("a"), agent("b"), agent("c")]}
    assert change(None, before) == {
        "whole": True,
        "status": {"phase": "collecting", "waiting": None},
        "agents": before["agents"],
        "gone": [],
    }
    after = {**before, "waiting": "for b", "agents": [agent("a"), agent("b", slot=2)]}
    assert change(before, after) == {
        "status": {"waiting": "for b"},
        "agents": [agent("b", slot=2)],
        "gone": ["c"],
    }
    assert change(after, after) == {"status": {}, "agents": [], "gone": []}


async def test_any_number_of_watchers_cost_one_look_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, num_reads = 100.0, 0
    monkeypatch.setattr(feeds.time, "monotonic", lambda: now)

    async def read() -> dict[str, Any]:
        nonlocal num_reads
        num_reads += 1
        return {"round": num_reads}

    feed = Feed(read)
    for _ in range(3):
        stream = feed.events()
        assert await anext(stream) == b"retry: 1000\n\n"
        assert json.loads((await anext(stream)).removeprefix(b"data: "))["status"] == {"round": 1}
        await stream.aclose()
    now = 101.0
    stream = feed.events()
    await anext(stream)
    assert b'"round": 2' in await anext(stream)
    await stream.aclose()


async def test_streams_end_with_the_server(store: Store) -> None:
    async def read() -> dict[str, Any]:
        return {"round": 1}

    feed = Feed(read)
    async with served(store, feed) as client, client.stream("GET", "/api/events") as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = reply.aiter_lines()
        assert await anext(lines) == "retry: 1000"
        feed.close()
        rest = [line async for line in lines if line]
    assert [json.loads(line.removeprefix("data: "))["status"] for line in rest] == [{"round": 1}]
