"""The status page as a real browser shows it, where there is one."""

import json
from pathlib import Path
from typing import Any

from ecavg.cloud_server.jobs import JobDirectory, Result
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import retention
from ecavg.common.config import RunConfig
from tests.browser.pages import given
from tests.unit.states import digest_of, model_of, run_rounds
from tests.unit.test_other_figures import run_a_round
from tests.unit.test_reports import RESULT
from tests.unit.test_standing import Viewed

MARKUP = "<img src=x onerror=\"document.title='markup'\"><script>document.title='markup'</script>"


async def status_of(result: Result, store: Store, state_dir: Path) -> dict[str, Any]:
    """After two rounds, the second with this result."""
    run_rounds(store, state_dir, 2)
    JobDirectory(state_dir / "jobs/round-0002").write_result(result)
    return await Viewed(store, state_dir).status.read()


async def test_candidates_of_the_latest_round_are_ranked_and_the_start_is_named(
    store: Store, tmp_path: Path
) -> None:
    tie = RESULT.model_copy(update={"candidates": {"aligned": 0.95, "average": 0.7, "greedy_soup": 0.95}})
    async with given(await status_of(tie, store, tmp_path), store) as page:
        ranked = await page.rows("#result")
        tiles = await page.text("#result dl")
        _, second, first = await page.rows("#rounds")
    assert ranked == [
        "Candidate Accuracy",
        "Greedy soup ✓ chosen edge-3, edge-1 95.0 %",
        "Aligned average 95.0 %",
        "Average 70.0 %",
    ]
    assert tiles == (
        "Accuracy at the start 95.0 % Greedy soup Accuracy as published 97.0 % The fine-tuned model"
        " Gain, points +2.0"
    )
    assert "start" not in first
    assert second.startswith(
        "Round 2 ✓ published start: greedy soup ⚑ flagged: edge-3 nobody knows 1 95.0 % 97.0 %"
    )


async def test_agents_that_adapt_the_global_model_are_told_from_those_that_use_it_as_it_is(
    store: Store, tmp_path: Path
) -> None:
    status = await status_of(RESULT, store, tmp_path)
    figures = {
        "away_since": None,
        "accuracy_local": 0.9,
        "accuracy_before": 0.9,
        "accuracy_after": 0.8,
        "message": "",
    }
    adapted = {**figures, "agent_id": "adapts", "applied": True, "accuracy_adapted": 0.95}
    as_it_is = {**figures, "agent_id": "takes", "applied": True, "accuracy_adapted": None}
    kept = {**figures, "agent_id": "keeps", "applied": False, "accuracy_adapted": 0.85}
    status["agents"] = [status["agents"][0] | agent for agent in (adapted, as_it_is, kept)]
    async with given(status, store) as page:
        _, *found = await page.rows("#agents")
    assert [row.split("away ")[1] for row in found] == [
        "uses the global model, adapted 90.0 % 90.0 % 80.0 % adapted 95.0 % +5.0",
        "uses the global model 90.0 % 90.0 % 80.0 % −10.0",
        "kept its own model 90.0 % 90.0 % 80.0 % adapted 85.0 % −5.0",
    ]


async def test_page_shows_who_uses_which_model_and_how_far_its_roll_out_is(
    store: Store, tmp_path: Path
) -> None:
    status = await status_of(RESULT, store, tmp_path)
    using = {"away_since": None, "is_canary": False, "applied": None}
    agents = (
        {**using, "agent_id": "tries", "applied": True, "model_round": 2, "is_canary": True},
        {**using, "agent_id": "waits", "model_round": 1},
    )
    status["agents"] = [status["agents"][0] | agent for agent in agents]
    status["pinned_round"] = 1
    for row, state, reason in zip(status["rounds"], ("released", "withdrawn"), (None, MARKUP), strict=True):
        row["roll_out"] = {"state": state, "reason": reason}
    async with given(status, store) as page:
        _, *found = await page.rows("#agents")
        result = await page.text("#result")
        _, second, first = await page.rows("#rounds")
    assert [row.split("away ")[1].rstrip("– ") for row in found] == [
        "in the canary: has the new model first uses the global model of round 2",
        "uses the global model of round 1",
    ]
    assert result.startswith(
        "Global model of round 1 The model of round 1 is pinned: agents use that one. Accuracy"
    )
    assert second.startswith(f"Round 2 ✓ published withdrawn: {MARKUP} start:")
    assert first.startswith("Round 1 ✓ published for all agents ")


async def test_what_the_audit_holds_against_an_agent_stands_beside_it(store: Store, tmp_path: Path) -> None:
    status = await status_of(RESULT, store, tmp_path)
    nothing = {"norm_ratio": 1.0, "is_clipped": False, "flags": [], "left_out": None}
    flagged = {**nothing, "flags": ["labels", "model"], "left_out": "quarantined"}
    clipped = {**nothing, "norm_ratio": 987.6, "is_clipped": True}
    rejected = {**nothing, "left_out": "large_update"}
    audits = (None, nothing, flagged, clipped, rejected)
    status["agents"] = [
        status["agents"][0] | {"agent_id": f"edge-{number}", "audit": audit, "away_since": None}
        for number, audit in enumerate(audits)
    ]
    async with given(status, store) as page:
        _, *found = await page.rows("#agents")
    told = {row.split()[0]: row.partition("away ")[2].rstrip("– ") for row in found}
    assert [told[f"edge-{number}"] for number in range(5)] == [
        "",
        "",
        "⚑ labels contradict those of the others, ⚑ model fails on the images of the others"
        " left out of the model: in quarantine",
        "update clipped, 988 times the median",
        "left out of the model: update too large",
    ]


async def test_page_makes_no_markup_of_names_and_messages(store: Store, tmp_path: Path) -> None:
    hostile = RESULT.model_copy(
        update={"soup": (MARKUP,), "start": MARKUP, "candidates": {MARKUP: 0.5, "greedy_soup": 0.4}}
    )
    status = await status_of(hostile, store, tmp_path)
    status["rounds"].append(status["rounds"][0] | {"round": 3, "outcome": MARKUP, "failure": MARKUP})
    status["rounds"][0] |= {"flagged": [MARKUP], "audit_note": MARKUP}
    audit = {"norm_ratio": 1.0, "is_clipped": True, "flags": [MARKUP], "left_out": MARKUP}
    status["agents"][0]["audit"] = audit
    status["agents"][0]["agent_id"] = status["agents"][0]["message"] = MARKUP
    async with given(status, store) as page:
        markup = await page.page.content()
        title = await page.page.title()
    assert "<img" not in markup
    assert markup.count("&lt;img src=x") >= 10
    assert title == "Round 3, collecting · mlp on digits · ECAvg"


async def test_report_makes_no_markup_of_what_is_in_it(store: Store, tmp_path: Path) -> None:
    status = await status_of(RESULT, store, tmp_path)
    audit = {"agent_id": MARKUP, "flags": [MARKUP]}
    left_out = {"reason": MARKUP, "message": MARKUP}
    agent = {"agent_id": MARKUP, "num_examples": 1, "applied": False, "reason": MARKUP, "left_out": left_out}
    report = {
        "round": 1,
        "outcome": "published",
        "model": MARKUP,
        "dataset": MARKUP,
        "agents": [agent],
        "audit": [audit],
        "audit_note": MARKUP,
        "candidates": {MARKUP: 0.5, "greedy_soup": 0.4},
        "soup": [MARKUP],
        "start": MARKUP,
        "classes": [{"name": MARKUP, "num_examples": 3, "accuracy_start": 0.1, "accuracy_published": 0.2}],
        "rejected": [{"agent_id": MARKUP, "reason": "", "message": MARKUP}],
        "late": [MARKUP],
        "seconds": {MARKUP: 1.0},
    }
    (tmp_path / "rounds/0001/report.json").write_text(json.dumps(report), "utf-8")
    async with given(status, store) as page:
        await page.page.locator("#rounds").get_by_role("link", name="Round 1").click()
        await page.until_text("#report", "Report of round 1")
        markup = await page.page.locator("#report").inner_html()
        assert "<img" not in markup
        assert "<script" not in markup
        assert markup.count("&lt;img src=x") >= 14
        assert "markup" not in await page.page.title()
        assert page.complaints == []


async def test_report_of_a_round_whose_model_was_removed_says_so(store: Store, tmp_path: Path) -> None:
    status = await status_of(RESULT, store, tmp_path)
    await Reports(RunConfig(), store).write(1)
    retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1e9, now=100.0)
    async with given(status, store) as page:
        await page.page.goto(f"{page.page.url}#round-1")
        await page.until_text("#report", "The model was removed")
        assert await page.page.get_by_role("link", name="Download the report").is_visible()
        await page.page.goto(f"{page.page.url.partition('#')[0]}#round-77")
        await page.until_text("#report", "there is no such round")
        await page.page.goto(f"{page.page.url.partition('#')[0]}#")
        await page.page.locator("#report").wait_for(state="hidden")


async def test_history_has_plots_that_tell_values_and_a_table_of_every_round(
    store: Store, tmp_path: Path
) -> None:
    await status_of(RESULT, store, tmp_path)
    for number in range(3, 46):
        store.set_phase(number, "failed", number + 0.5, failure="no luck")
        store.open_round(number + 1, digest_of(model_of(2)), number + 1.0)
    status = await Viewed(store, tmp_path).status.read()
    async with given(status, store) as page:
        area = page.page.locator("#plot-score .u-over")
        # Round 2 of 45 is near the left end.
        await area.hover(position={"x": (await area.bounding_box())["width"] / 44, "y": 50})
        legend = await page.text("#plot-score .u-legend")
        assert legend.startswith("round2edges")
        assert "published97.0 %" in legend
        await page.page.get_by_text("The figures of all rounds").click()
        assert len(await page.rows("#history")) == 21
        for number in (2, 3):
            await page.page.get_by_role("button", name="Next page of history").click()
            await page.until_text("#history nav", f"page {number} of 3")
        *_, second, _first = await page.rows("#history")
    assert second.startswith("Round 2 90.0 % 90.0 % 90.0 %")
    assert "95.0 % 97.0 % 97.0 %" in second


async def test_figure_of_another_task_has_its_own_name_and_is_a_number(store: Store, tmp_path: Path) -> None:
    status = await run_a_round(store, tmp_path)
    async with given(status, store) as page:
        assert await page.text("#result dl") == (
            "R² at the start 0.400 Aligned average R² as published 0.500 The fine-tuned model Gain +0.100"
        )
        assert (await page.rows("#result"))[0] == "Candidate R²"
        _, agent, _ = await page.rows("#agents")
        assert agent.endswith("– – -0.100 adapted 0.300 –")
        await page.until_text("#plot-score figcaption", "^R² over the rounds$")
        await page.page.get_by_text("The figures of all rounds").click()
        assert "0.900 0.900 0.900 -0.250 0.400 0.500 0.500 0.300" in (await page.rows("#history"))[1]
        await page.page.goto(f"{page.page.url}#round-1")
        await page.until_text("#report", "the global model has a score of 0.500")
        assert "has a score of 0.500 (R²)." in await page.text("#report")
        assert "%" not in await page.text("main")
        assert page.complaints == []
