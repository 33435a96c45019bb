"""What the page tells of agents at work, of those that hold up a round, and of a crowd of them."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.jobs import Progress, round_job
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.common.config import RunConfig
from tests.browser.pages import NARROW, WIDE, Given, axe_script, given
from tests.unit.states import begin, run_rounds
from tests.unit.test_page import contribute, report_of
from tests.unit.test_reports import RESULT
from tests.unit.test_standing import Viewed

# 10:42 UTC on a day of 2026.
AT_10_42 = 1_770_720_120.0
DAY_SECONDS = 24 * 3600.0
NUM_AGENTS = 1000
# What one update of the page may take with NUM_AGENTS agents. It takes a few milliseconds on an idle machine.
UPDATE_MS = 250


async def collecting(store: Store, state_dir: Path) -> dict[str, Any]:
    """Return the status of an open first round without agents."""
    begin(store, state_dir)
    return await Viewed(store, state_dir).status.read() | {"agents": []}


def agent(slot: int, **fields: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(
        (
            "outcome", "accuracy_local", "accuracy_before", "accuracy_after", "accuracy_adapted", "applied",
            "audit", "upload_place", "selection", "progress", "away_since",
        )
    )  # fmt: skip
    return {
        **nothing,
        "agent_id": f"edge-{slot}",
        "slot": slot,
        "state": "watching",
        "message": "",
        "is_ready": True,
        **fields,
    }


def progress(phase: str, done: float, total: float | None, unit: str, **more: Any) -> dict[str, Any]:
    nothing = {"rate": None, "seconds_left": None, "loss": None}
    return {"phase": phase, "done": done, "total": total, "unit": unit, **nothing, **more}


WORK = [
    (progress("pre_training", 40, 100, "steps"), "pre-training 40 %"),
    (
        progress("pre_training", 399, 1000, "steps", seconds_left=61.2, loss=0.4567),
        "pre-training 39 %, 62 s left, loss 0.457",
    ),
    (progress("uploading", 3.1e6, 9.1e6, "bytes", rate=1.2e6), "uploading 3.1 of 9.1 MB at 1.2 MB/s"),
    (
        progress("uploading", 3.1e6, 9.1e6, "bytes", rate=2e4, seconds_left=300),
        "uploading 3.1 of 9.1 MB at 20.0 kB/s, 5 min left",
    ),
    (progress("queued", 4, None, "bytes"), "queued as 4th"),
    (progress("downloading", 512, None, "bytes"), "downloading 512 B"),
    (progress("reading", 20, None, "examples"), "reading its data 20 examples"),
    (progress("evaluating", 1, 3, "steps"), "evaluating 33 %"),
    (progress("adapting", 3, 3, "steps"), "adapting 100 %"),
]


async def test_page_tells_how_far_each_agent_is(store: Store, tmp_path: Path) -> None:
    status = await collecting(store, tmp_path)
    status["agents"] = [agent(slot, progress=doing) for slot, (doing, _) in enumerate(WORK)]
    status["agents"].append(agent(99))
    async with given(status, store) as page:
        _, *rows = await page.rows("#agents")
    told = {row.split(" #")[0]: row.partition(" ")[2].partition(" ")[2].rstrip(" –") for row in rows}
    assert [told[f"edge-{slot}"] for slot in range(len(WORK))] == [text for _, text in WORK]
    assert told["edge-99"] == "working"


async def test_page_tells_since_when_an_agent_is_away(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.cloud_server.showing.feed.time.time", lambda: AT_10_42 + 60)
    status = await collecting(store, tmp_path)
    # What it did before it went away says nothing any more.
    doing = progress("pre_training", 1, 2, "steps")
    status["agents"] = [
        agent(1, state="away", away_since=AT_10_42, progress=doing),
        agent(2, state="away", away_since=AT_10_42 - DAY_SECONDS),
        agent(3, state="away", outcome="accepted", away_since=AT_10_42),
        agent(4, state="away"),
    ]
    async with given(status, store) as page:
        _, *rows = await page.rows("#agents")
    assert [row.rstrip(" –") for row in rows] == [
        "edge-1 #1 away since 10:42",
        "edge-2 #2 away since 9 Feb, 10:42",
        "edge-4 #4 away",
        "edge-3 #3 ✓ contributed, away since 10:42",
    ]


async def test_who_holds_up_the_round_is_named_above_all_and_comes_first(
    store: Store, tmp_path: Path
) -> None:
    status = await collecting(store, tmp_path)
    waiting = "Waiting for 2 of 5: <b>edge-3</b> uploads, 4 min left; edge-4 has been away for 12 min."
    status |= {"waiting": waiting, "trainer": {"state": "idle", "seconds_left": None}}
    slow, fast = (progress("uploading", 1, 9, "bytes", seconds_left=seconds) for seconds in (240, 3))
    status["agents"] = [
        agent(1, outcome="accepted"),
        agent(2, progress=fast),
        agent(3, progress=slow),
        agent(4, state="away"),
        agent(5, outcome="rejected", message="labels out of range"),
        agent(6, outcome="accepted", audit={"flags": ["labels"], "is_clipped": False, "left_out": None}),
    ]
    async with given(status, store) as page:
        assert await page.text("#waiting") == waiting
        _, *rows = await page.rows("#agents")
        assert [row.split()[0] for row in rows] == [f"edge-{slot}" for slot in (5, 6, 4, 3, 2, 1)]
        status["waiting"] = None
        await page.page.locator("#waiting").wait_for(state="hidden")


async def test_cloud_says_how_long_its_own_work_takes(store: Store, tmp_path: Path) -> None:
    status = await collecting(store, tmp_path)
    status |= {"phase": "fine_tuning", "progress": {"done": 2, "total": 5, "loss": 0.5}}
    status["trainer"] = {"state": "working", "seconds_left": 40.0}
    async with given(status, store) as page:
        assert await page.text("#progress") == "40 %, step 2 of 5 loss 0.500, 40 s left"


async def test_thousand_agents_are_searched_and_paged_and_the_page_stays_quick(
    store: Store, tmp_path: Path
) -> None:
    status = await collecting(store, tmp_path)
    status["agents"] = [agent(slot, outcome="accepted") for slot in range(1, NUM_AGENTS + 1)]
    async with given(status, store) as page:
        _, first, *rest = await page.rows("#agents")
        assert (first.split()[0], len(rest)) == ("edge-1", 24)
        assert await page.text("#agents nav") == "Previous page 1 of 40 Next"
        await page.page.get_by_role("button", name="Next page of agents").click()
        assert (await page.rows("#agents"))[1].startswith("edge-26 ")
        await page.page.get_by_label("Find").fill("EDGE-77")
        assert [row.split()[0] for row in (await page.rows("#agents"))[1:]] == [
            "edge-77", *(f"edge-{number}" for number in range(770, 780)),
        ]  # fmt: skip
        await page.page.get_by_label("Find").fill("")
        # Every agent changes with each update.
        durations = []
        for percent in range(1, 6):
            doing = progress("pre_training", percent, 100, "steps")
            status["agents"] = [agent(slot, progress=doing) for slot in range(1, NUM_AGENTS + 1)]
            await page.until_text("#agents", f"pre-training {percent} %")
            script = "performance.getEntriesByName('update')[0].duration"
            durations.append(await page.page.evaluate(script))
    assert max(durations) < UPDATE_MS, durations
    print(f"an update with {NUM_AGENTS} agents takes {sorted(durations)} ms")


async def test_search_that_finds_nobody_says_so(store: Store, tmp_path: Path) -> None:
    status = await collecting(store, tmp_path)
    status["agents"] = [agent(slot) for slot in range(1, 40)]
    async with given(status, store) as page:
        await page.page.get_by_label("Find").fill("<b>x")
        await page.until_text("#agents", "No agent has this in its name")


async def test_axe_has_nothing_serious_to_say_and_nothing_is_cut_off(store: Store, tmp_path: Path) -> None:
    script = axe_script().read_text("utf-8")
    run_rounds(store, tmp_path, 3)
    contribute(store, 3, "edge-2", 0.5)
    store.record_report(3, report_of("edge-2", 0.7))
    round_job(store.state_dir, 3).write_result(RESULT)
    for loss in (2.0, 1.0):
        round_job(store.state_dir, 3).append_progress(
            Progress(phase="fine_tuning", done=1, total=2, loss=loss)
        )
    await Reports(RunConfig(), store).write(3)
    status = await Viewed(store, tmp_path).status.read()
    doing = progress("uploading", 3, 9, "bytes", rate=1.0)
    status["agents"] += [agent(slot, progress=doing) for slot in range(3, 40)]
    status["agents"].append(agent(40, state="away", away_since=AT_10_42, message="a-long-word" * 20))
    status |= {"waiting": "Waiting for 1 of 3: edge-2 uploads.", "progress": None}
    async with given(status, store) as page:
        await page.page.locator("#plot-score canvas").wait_for()
        await page.page.get_by_text("The figures of all rounds").click()
        await page.page.get_by_role("link", name="Round 3").first.click()
        await page.until_text("#report", "Download the model")
        await page.page.evaluate(script)
        for width, scheme in itertools.product((WIDE, NARROW), ("light", "dark")):
            await page.page.emulate_media(color_scheme=scheme)
            await page.page.set_viewport_size({"width": width, "height": 900})
            assert await serious_findings(page) == []
            assert await page.page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.complaints == []


async def serious_findings(page: Given) -> list[Any]:
    """Return what axe-core finds that keeps people from using the page, and where."""
    found = await page.page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
